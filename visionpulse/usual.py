"""The usual call, known at one look: true means that `checks` would find nothing wrong.

Anything else, right or wrong, goes through the checks, which look at each argument and say what is
the matter. A decode step makes the same call for every layer, and behind a layer that filled the
caches each function entered costs as much as a row of K: so these are few and flat.
"""

import torch
from torch import Tensor

from .cache import MAX_GROUP, KVCache
from .float8 import FLOAT8
from .selection import Selection
from .tensor_checks import have_memory, is_eager
from .visual import VisualTokens


def attention(q: Tensor, kv: object, visual: VisualTokens | None) -> bool:
    """Whether `q` [B, H, D] fits a contiguous cache whose rows are full, and its visual set."""
    if type(kv) is not KVCache or type(q) is not Tensor or q.dim() != 3 or not is_eager():
        return False
    k, v = kv.k, kv.v
    (rows, heads, dim), (batch, kv_heads, _, width) = q.shape, k.shape
    return (
        kv.lengths is kv.starts is kv.k_scale is kv.v_scale is None
        and q.dtype is k.dtype is not FLOAT8
        and q.device == k.device
        and rows == batch
        and dim == width
        and q.stride(2) == 1
        and 0 < heads <= MAX_GROUP * kv_heads
        and heads % kv_heads == 0
        and not (
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        )
        and have_memory(q, k, v)
        and (visual is None or visual_set(visual, batch, k.shape[2], k.device))
    )


def visual_set(visual: object, rows: int, size: int, device: torch.device) -> bool:
    """Whether a visual set that owns its tables fits so many rows and slots."""
    if type(visual) is not VisualTokens or visual.is_borrowed:
        return False
    spans = visual.spans
    return (
        spans.shape[0] == rows
        and visual.size <= size
        and spans.device == device
        and have_memory(spans, visual.offsets, visual.counts)
    )


def selection(chosen: object, rows: int, device: torch.device) -> bool:
    """Whether a selection was made by a backend, for so many rows."""
    if type(chosen) is not Selection or not chosen.trusted or not is_eager():
        return False
    indices, counts = chosen.indices, chosen.counts
    return (
        indices.dtype is counts.dtype is torch.int32
        and indices.dim() == 2
        and indices.shape[0] == rows
        and indices.shape[1] > 0
        and counts.shape == (rows,)
        and indices.is_contiguous()
        and counts.is_contiguous()
        and indices.device == counts.device == device
        and have_memory(indices, counts)
    )


def ranked(scores: Tensor, mass: Tensor, mass_mean: Tensor | None, visual: object) -> bool:
    """Whether scores [B, N] and masses [B] are as `score` gives them, and fit a visual set."""
    if type(scores) is not Tensor or type(mass) is not Tensor or type(mass_mean) is not Tensor:
        return False
    rows = mass.shape
    return (
        is_eager()
        and scores.dim() == 2
        and len(rows) == 1
        and scores.shape[0] == rows[0]
        and mass_mean.shape == rows
        and scores.dtype is mass.dtype is mass_mean.dtype is torch.float32
        and mass.device == mass_mean.device == scores.device
        and scores.is_contiguous()
        and have_memory(scores, mass, mass_mean)
        and visual_set(visual, rows[0], scores.shape[1], scores.device)
    )
