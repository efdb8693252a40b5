"""A pytest plugin: a GPU that is none for the whole run; see device.py.

With CUSIM_MODULE the backend `cuda` runs on the simulated kernels, else `reference` stands in.
"""

import os

import device as fake

from visionpulse import _native
from visionpulse.backends.triton import TritonBackend


def pytest_configure() -> None:
    if "CUSIM_MODULE" in os.environ:
        import stand_in

        simulated = fake.native(stand_in.load())
        _native._load = lambda: (simulated, None)
    TritonBackend.unavailable = lambda self: "there is nothing to compile for"
    fake.plug_in()
