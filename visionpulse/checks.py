"""The checks of a call's arguments: what was expected, what came, and the way out.

What a record is made of is checked when it is made. Rank, dtype, device, strides and host numbers
are checked always. Values inside tensors are checked only where the tensor is on the CPU, or when
a person asks by `kv.validate()`: nothing in a decode step may read the device.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cache import MAX_GROUP, MAX_QUERIES, Cache, KVCache, PagedKVCache
from .float8 import FLOAT8
from .selection import Selection
from .tensor_checks import (
    are_readable,
    has_storage,
    in_range,
    is_eager,
    per_row,
    same_device,
    tensor,
    unit_stride,
)
from .visual import VisualTokens

QUERIES_OF_FLOAT8 = (torch.float32, torch.bfloat16, torch.float16)


def query(q: Tensor, kv: Cache) -> None:
    """Check a query against its cache."""
    if not isinstance(q, Tensor) or q.dim() != 4:
        tensor("q", q, 3, "[B, H, D], or [B, Q, H, D]")
    elif not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(
            f"q [B, Q, H, D] has 1 to {MAX_QUERIES} queries a row, got Q={q.shape[1]}; "
            "make several calls, or run a prefill"
        )
    if kv.dtype == FLOAT8:
        if q.dtype not in QUERIES_OF_FLOAT8:
            raise TypeError(
                "q beside a cache of float8_e4m3fn must be float32, bfloat16 or float16, "
                f"got {q.dtype}; q itself is not quantised: use .to() of one of them"
            )
    elif q.dtype != kv.dtype:
        raise TypeError(
            f"q, K and V must share a dtype, got {q.dtype} and {kv.dtype}; "
            "only a cache of float8_e4m3fn has a dtype of its own"
        )
    same_device("q", q, kv.device, "the cache")
    if q.shape[0] != kv.batch:
        raise ValueError(f"q has {q.shape[0]} rows, the cache {kv.batch}; both are B")
    if q.shape[-1] != kv.head_dim:
        raise ValueError(f"q has head dim {q.shape[-1]}, the cache {kv.head_dim}")
    heads, kv_heads = q.shape[-2], kv.kv_heads
    if heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got H={heads} and G={kv_heads}; "
            + (
                "pass K and V before they are repeated per query head"
                if q.dim() == 3
                else "several queries are [B, Q, H, D]: .transpose(1, 2) of what transformers has"
            )
        )
    if heads // kv_heads > MAX_GROUP:
        raise ValueError(
            f"a KV head serves at most {MAX_GROUP} query heads, got {heads // kv_heads}"
        )
    unit_stride("q", q)


def query_counts(q_counts: Tensor, q: Tensor) -> None:
    """Check how many queries of each row are real."""
    if q.dim() != 4:
        raise ValueError(
            f"q_counts counts the queries of q [B, Q, H, D], got q {tuple(q.shape)}; leave it out"
        )
    real_queries(q_counts, q.shape[0], q.shape[1], q.device)


def real_queries(q_counts: Tensor, rows: int, queries: int, device: torch.device) -> None:
    """Check q_counts of `rows` rows."""
    per_row("q_counts", q_counts, rows, device)
    has_storage(("q_counts", q_counts))
    if are_readable(device):
        in_range("q_counts", q_counts, 0, queries, "it counts the real queries of a row")


def storages(q: Tensor, kv: Cache, visual: VisualTokens | None) -> None:
    """Check that the tensors of a call still have their memory: a kernel reads by address."""
    is_paged = isinstance(kv, PagedKVCache)
    has_storage(
        ("q", q),
        ("k_pages" if is_paged else "k", kv.k_data),
        ("v_pages" if is_paged else "v", kv.v_data),
        ("lengths", kv.lengths),
        ("starts", kv.starts),
        ("k_scale", kv.k_scale),
        ("v_scale", kv.v_scale),
        ("block_table", kv.block_table if isinstance(kv, PagedKVCache) else None),
    )
    if visual is not None:
        visual_tables(visual)


def visual_tables(visual: VisualTokens) -> None:
    """Check the memory of a visual set, and the values that a caller may have changed."""
    has_storage(
        ("visual.spans", visual.spans),
        ("visual.offsets", visual.offsets),
        ("visual.counts", visual.counts),
    )
    if visual.is_borrowed and are_readable(visual.device):
        visual.validate()


def no_grad(*tensors: Tensor) -> None:
    """Refuse inputs that need a gradient: the ops are for inference."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "the ops have no backward, but an input needs a gradient; "
            "call them under torch.no_grad() or torch.inference_mode(), or detach the input"
        )


def visual_set(visual: VisualTokens | None, rows: int, size: int, device: torch.device) -> None:
    """Check a visual set against the rows, slots and device it is used with."""
    if not isinstance(visual, VisualTokens):
        raise TypeError(
            f"visual must be a VisualTokens, got {type(visual).__name__}; "
            "make one with VisualTokens.from_mask, from_spans or from_ids"
        )
    if visual.batch != rows:
        raise ValueError(f"visual has {visual.batch} rows, the cache {rows}; both are B")
    # not in a graph: a guard on the size of one prompt would compile anew for the next
    if is_eager() and visual.size > size:
        raise ValueError(
            f"visual covers {visual.size} positions, the cache has {size} slots; "
            "cut the mask to the cache"
        )
    same_device("visual", visual.spans, device, "the cache")


def selection(chosen: Selection, rows: int, size: int, device: torch.device) -> None:
    """Check a selection against the rows, slots and device it is used with."""
    if not isinstance(chosen, Selection):
        raise TypeError(
            f"selection must be a Selection, got {type(chosen).__name__}; "
            "decode and select give one"
        )
    indices = tensor("selection.indices", chosen.indices, 2, "int32 [B, K_max]")
    if indices.dtype != torch.int32:
        raise TypeError(f"selection.indices must be int32, got {indices.dtype}")
    if indices.shape[0] != rows or indices.shape[1] == 0:
        raise ValueError(
            f"selection.indices must be [{rows}, K_max >= 1], got {tuple(indices.shape)}"
        )
    if not indices.is_contiguous():
        raise ValueError("selection.indices must be contiguous; call .contiguous()")
    same_device("selection", indices, device, "the cache")
    per_row("selection.counts", chosen.counts, rows, device)
    has_storage(("selection.indices", indices), ("selection.counts", chosen.counts))
    if not chosen.trusted and are_readable(device):
        _selection_values(indices, chosen.counts, size)


def selection_buffers(
    given: Any, rows: int, k_max: int, dtype: torch.dtype, device: torch.device
) -> Selection | None:
    """Check a selection that the caller gives to be written."""
    if given is None:
        return None
    if not isinstance(given, Selection):
        raise TypeError(
            f"selection must be a Selection, got {type(given).__name__}; "
            "Selection.empty(rows, k_max) makes its buffers"
        )
    wanted = {
        "indices": ((rows, k_max), torch.int32), "counts": ((rows,), torch.int32),
        "mass": ((rows,), dtype), "mass_mean": ((rows,), dtype),
    }  # fmt: skip
    for field, (shape, kind) in wanted.items():
        name, value = f"selection.{field}", getattr(given, field)
        buffer(name, value, shape, torch.empty(0, dtype=kind, device=device))
        if not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")
    return replace(given, trusted=True)  # a backend writes it


def _selection_values(indices: Tensor, counts: Tensor, size: int) -> None:
    in_range("selection.counts", counts, 0, indices.shape[1], "it counts the indices of a row")
    inside = torch.arange(indices.shape[1]) < counts[:, None]  # [B, K_max]
    kept = indices[inside]
    if kept.numel():
        in_range("selection.indices", kept, 0, size - 1, "they are positions of the cache")
    if not (indices.diff(dim=1) > 0)[inside[:, 1:]].all():
        raise ValueError("selection.indices must be strictly ascending in each row; sort them")


def buffer(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Check a tensor that the caller gives to be written."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of shape {shape}, got {got}")
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, got {value.dtype}")
    same_device(name, value, like.device, "the query")
    unit_stride(name, value)
    has_storage((name, value))


def scores_buffer(value: Tensor, size: int, q: Tensor) -> None:
    """Check the buffer that `decode` fills with the scores it ranked."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    buffer("scores", value, (*q.shape[:-2], size), q.new_empty(0, dtype=dtype))
    if not value.is_contiguous():
        raise ValueError("scores must be contiguous; pass torch.empty(B, N), or (B, Q, N)")


def ranked(scores: Tensor, mass: Tensor, mass_mean: Tensor | None) -> None:
    """Check the scores and masses that `select` takes."""
    if not isinstance(scores, Tensor) or scores.dim() != 3:
        tensor("scores", scores, 2, "float32 [B, N], or [B, Q, N]")
    masses = ("mass", mass), ("mass_mean", mass_mean)
    for name, value in (("scores", scores), *masses):
        if value is not None and value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32, got {value.dtype}")
    has_storage(("scores", scores), *masses)
    if not scores.is_contiguous():
        raise ValueError("scores must be contiguous; call .contiguous()")
    rows = scores.shape[:-1]
    for name, value in masses:
        if value is None:
            continue
        if value.shape != rows:
            tensor(name, value, len(rows), "float32 [B], or [B, Q]")
            raise ValueError(
                f"{name} has {value.shape[0]} rows, scores {scores.shape[0]}"
                if scores.dim() == 2
                else f"{name} must be {tuple(rows)}, got {tuple(value.shape)}"
            )
        same_device(name, value, scores.device, "scores")


def row_cut(name: str, value: Tensor, scores: Tensor) -> None:
    """Check the starts or lengths that cut the candidates of `select`."""
    per_row(name, value, scores.shape[0], scores.device)
    has_storage((name, value))


def number(name: str, value: Any) -> float:
    """Check a number given to an op; gives it as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(value) < float("inf"):  # false for NaN as well
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """Check a number that must be > 0."""
    checked = number(name, value)
    if checked <= 0:
        raise ValueError(f"{name} must be > 0, got {value!r}; None leaves it out")
    return checked


def mass_for(mass: str) -> None:
    """Refuse a `select` whose budget follows the mean mass without it."""
    if mass == "mean":
        raise ValueError("the config has mass='mean': pass mass_mean, which score() gives last")


def both_or_neither(visual: object, selection: object) -> None:
    """Refuse half of what a follower needs."""
    if (visual is None) != (selection is None):
        missing = "visual" if visual is None else "selection"
        raise ValueError(
            f"a follower needs visual and selection, got no {missing}; "
            "pass neither for dense decode"
        )


def bound(value: Any, policy: object) -> int:
    """Check the host bound of a budget policy."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"bound() of {type(policy).__name__} must give an int >= 1, got {value!r}; "
            "it is the width of the index buffer"
        )
    return value


def counts(value: Any, n_visual: Tensor, policy: object) -> Tensor:
    """Check what a budget policy gives on the device; its values are clamped by the kernel."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != n_visual.shape or dtype != torch.int32:
        raise ValueError(
            f"counts() of {type(policy).__name__} must give int32 {tuple(n_visual.shape)}, "
            f"got {dtype} {shape}; use .to(torch.int32)"
        )
    return value  # type: ignore[no-any-return]


def cache(kv: object) -> None:
    """Refuse what is not a cache."""
    if not isinstance(kv, (KVCache, PagedKVCache)):
        raise TypeError(
            f"kv must be a KVCache or PagedKVCache, got {type(kv).__name__}; "
            "wrap K and V: KVCache(k, v)"
        )


def window(value: Any) -> int:
    """Check the window: the last keys that stay visible, the query's own counted."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"window must be a number of keys, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"window must be at least 1 (the query's own key), got {value}")
    return value
