"""What both native engines serve."""

import torch
from torch import Tensor

from ..cache import MAX_GROUP, MAX_HEAD_DIM, Cache

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of q and the output


def refuses(q: Tensor, kv: Cache) -> str | None:
    """Why neither engine serves this call, or None."""
    if q.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"it serves head dims up to {MAX_HEAD_DIM}, not {q.shape[-1]}"
    if q.shape[-2] > MAX_GROUP * kv.kv_heads:
        return f"it serves up to {MAX_GROUP} query heads per KV head"
    return None


def refuses_scores(scores: Tensor) -> str | None:
    """The same of a choice from scores."""
    if scores.dtype != torch.float32:
        return f"it selects from float32 scores, not {scores.dtype}"
    return None


def flat(mass: Tensor) -> Tensor:
    """A mass as the engines read it."""
    if mass.dtype == torch.float32 and mass.is_contiguous():
        return mass
    return mass.float().contiguous()
