"""Named ranges around the stages, for a profiler that looks; nothing when none does."""

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING: AbstractContextManager[None] = nullcontext()
_enabled = False


def enable(on: bool = True) -> None:
    """Turn the ranges on or off; off they cost one test of a flag."""
    global _enabled
    _enabled = on


def stage(name: str) -> AbstractContextManager[object]:
    """A range named `visionpulse::<name>` in a torch profile, and in NVTX where CUDA runs."""
    if not _enabled:
        return _NOTHING
    if torch.cuda.is_available():
        return torch.cuda.nvtx.range(f"visionpulse::{name}")
    return torch.profiler.record_function(f"visionpulse::{name}")
