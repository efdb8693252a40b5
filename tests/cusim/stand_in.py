"""A pytest plugin: the backend `cuda` runs on the simulated GPU, on CPU tensors.

The module comes from CUSIM_MODULE; CUSIM_SEED orders threads and blocks, CUSIM_LANDING says when
asynchronous copies land, CUSIM_GPU is "capability,multiprocessors,shared bytes".
"""

import os
from pathlib import Path
from typing import Any

import build
from visionpulse import _native
from visionpulse.backends import cuda


def load() -> Any:
    """The simulated module, set up from the environment."""
    module: Any = build.load(Path(os.environ["CUSIM_MODULE"]))
    module.configure(
        int(os.environ.get("CUSIM_SEED", "1")), os.environ.get("CUSIM_LANDING") == "early"
    )
    if gpu := os.environ.get("CUSIM_GPU"):
        module.plug_in(*map(int, gpu.split(",")))
    return module


def plug_in() -> Any:
    """Make `cuda` the simulated GPU for the rest of this process."""
    simulated = load()
    _native._load = lambda: (simulated, None)
    cuda.CudaBackend.auto_devices = ("cpu", "cuda")
    return simulated


def pytest_configure() -> None:
    """Run the suite's tests of `cuda` on it."""
    plug_in()
