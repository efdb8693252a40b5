"""What the CUDA engine is handed: addresses, strides and host numbers, as plain tuples.

`csrc/cuda/reader.h` takes them apart in the same order.
"""

import torch
from torch import Tensor

from ..cache import Cache, PagedKVCache
from ..call import Params
from ..float8 import FLOAT8
from ..selection import Selection
from ..visual import VisualTokens

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of q and the output
STORAGES = DTYPES | {FLOAT8: 3}  # of K and V
SCORES = {"prob": 0, "logit": 1, "prob_tau": 2}


def address(tensor: Tensor | None) -> int:
    """Where its first element lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def query(q: Tensor, kv: Cache) -> tuple[int, ...]:
    """Q [B, H, D] or [B, Q, H, D], and the sizes of the call."""
    heads, dim = q.shape[-2:]
    strides = q.stride(0), q.stride(-2)
    return q.data_ptr(), *strides, DTYPES[q.dtype], q.shape[0], heads, kv.kv_heads, dim


def queries(q: Tensor, out: Tensor | None, q_counts: Tensor | None) -> tuple[int, int, int, int]:
    """The queries of a row: how many, the strides from one to the next, and which are real."""
    if q.dim() == 3:
        return 1, 0, 0, 0
    return q.shape[1], q.stride(1), 0 if out is None else out.stride(1), address(q_counts)


def cache(kv: Cache) -> tuple[int, ...]:
    """K and V, contiguous or paged."""
    k, v = kv.k_data, kv.v_data
    table = kv.block_table if isinstance(kv, PagedKVCache) else None
    return (
        *(k.data_ptr(), v.data_ptr(), address(kv.starts), address(kv.lengths)),
        *((0, 0) if table is None else (table.data_ptr(), table.stride(0))),
        *kv.k_strides,
        *kv.v_strides,
        *(kv.capacity, kv.page_size, k.shape[0], STORAGES[k.dtype]),
        *_scale(kv.k_scale),
        *_scale(kv.v_scale),
    )


def _scale(scale: Tensor | None) -> tuple[int, int]:
    """Its address, and the step from one KV head to the next: 0 where all share one number."""
    return address(scale), 0 if scale is None or scale.numel() == 1 else 1


def visual(tokens: VisualTokens | None) -> tuple[int, int, int]:
    """Its spans and their offsets."""
    if tokens is None:
        return 0, 0, 0
    return tokens.spans.data_ptr(), tokens.offsets.data_ptr(), tokens.spans.shape[1]


def params(given: Params) -> tuple[float, ...]:
    """The host numbers of a call, and the tensors that may stand for some of them."""
    return (
        *(given.scale, given.softcap, given.window, given.tau, given.r_min, given.r_max),
        *(given.mass_of == "mean", SCORES[given.score], given.k_max),
        *(address(given.ratio), address(given.wanted)),
    )


def output(out: Tensor | None) -> tuple[int, int, int]:
    """Where the output [B, H, D] or [B, Q, H, D] goes."""
    if out is None:
        return 0, 0, 0
    return out.data_ptr(), out.stride(0), out.stride(-2)


def kept(selection: Selection | None) -> tuple[int, int, int, bool]:
    """The lists of a selection that is attended; and whether to check values nobody read."""
    if selection is None:
        return 0, 0, 0, False
    indices = selection.indices
    return indices.data_ptr(), selection.counts.data_ptr(), indices.shape[1], not selection.trusted


def chosen(selection: Selection) -> tuple[int, int, int, int]:
    """Where a choice and its masses go."""
    return (
        *(selection.indices.data_ptr(), selection.counts.data_ptr()),
        *(selection.mass.data_ptr(), selection.mass_mean.data_ptr()),
    )
