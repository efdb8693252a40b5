"""Cold data: tensors taken out of caches of any size before a call is timed."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _native


def evict(tensors: Iterable[Tensor]) -> None:
    """Evict the memory of CPU tensors, line by line; other tensors stay as they are.

    Their code stays in the caches, as it does for a layer of a decode step, and so do results and
    scratch that are not named. A CPU without an instruction for it is an error.
    """
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (t.untyped_storage() for t in tensors if t.device.type == "cpu")
    }
    for address, size in storages.items():
        if not _native.module().cpu.evict(address, size):
            raise RuntimeError(
                "this CPU cannot evict cache lines; time on one with CLFLUSHOPT, or a 64-bit Arm"
            )


def can_evict(device: torch.device) -> bool:
    """Whether `evict` works for tensors of this device."""
    return (
        device.type == "cpu"
        and _native.failure() is None
        and bool(_native.module().cpu.evict(0, 0))
    )
