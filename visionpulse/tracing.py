"""Named ranges around the stages, for a profiler that looks; nothing when none does."""

from contextlib import AbstractContextManager, ExitStack, nullcontext

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
    ranges = ExitStack()  # torch's profiler does not see NVTX, nor nsys what torch records
    ranges.enter_context(torch.profiler.record_function(f"visionpulse::{name}"))
    if torch.cuda.is_available():
        ranges.enter_context(torch.cuda.nvtx.range(f"visionpulse::{name}"))
    return ranges
