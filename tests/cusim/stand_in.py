"""A pytest plugin: the backend `cuda` runs on the simulated GPU, on CPU tensors.

The module comes from CUSIM_MODULE; CUSIM_SEED orders threads and blocks, CUSIM_LANDING says when
asynchronous copies land, CUSIM_GPU is "capability,multiprocessors,shared bytes".
"""

import importlib.util
import os
from types import ModuleType

from visionpulse import _native
from visionpulse.backends import cuda


def load() -> ModuleType:
    """The simulated module, set up from the environment."""
    spec = importlib.util.spec_from_file_location("_cusim", os.environ["CUSIM_MODULE"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.configure(
        int(os.environ.get("CUSIM_SEED", "1")), os.environ.get("CUSIM_LANDING") == "early"
    )
    if gpu := os.environ.get("CUSIM_GPU"):
        module.plug_in(*map(int, gpu.split(",")))
    return module


def plug_in() -> ModuleType:
    """Make `cuda` the simulated GPU for the rest of this process."""
    simulated = load()
    _native._load = lambda: (simulated, None)
    cuda.CudaBackend.auto_devices = ("cpu", "cuda")
    return simulated


def pytest_configure() -> None:
    """Run the suite's tests of `cuda` on it."""
    plug_in()
