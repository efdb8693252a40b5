"""The checks of what the structs are made of, made when a struct is made."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import in_range, per_row, same_device, tensor, unit_stride

if TYPE_CHECKING:
    from .structs import Cache, KVCache, PagedKVCache

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256
MAX_POSITION = 2**31 - 2


def _keys_and_values(k: Tensor, v: Tensor, names: tuple[str, str], shape: str) -> None:
    tensor(names[0], k, 4, shape)
    tensor(names[1], v, 4, shape)
    if k.dtype not in DTYPES:
        raise TypeError(
            f"the cache must be float32, bfloat16 or float16, got {k.dtype}; "
            "dequantise it first (float64 is for the reference alone)"
        )
    if v.dtype != k.dtype:
        raise TypeError(f"{names[0]} and {names[1]} must share a dtype, got {k.dtype}, {v.dtype}")
    if v.shape != k.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must share a shape, got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    same_device(names[1], v, k.device, names[0])
    if 0 in k.shape:
        raise ValueError(f"{names[0]} must not be empty, got shape {tuple(k.shape)}")
    if k.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head dim must be at most {MAX_HEAD_DIM}, got {k.shape[-1]}")
    unit_stride(names[0], k)
    unit_stride(names[1], v)


def _not_repeated(name: str, value: Tensor, axis: int) -> None:
    if value.shape[axis] > 1 and value.stride(axis) == 0:
        raise ValueError(
            f"{name} repeats one head {value.shape[axis]} times (head stride 0); "
            "pass K and V before they are repeated per query head, [B, G, N, D]"
        )


def contiguous_cache(kv: "KVCache") -> None:
    """Check what `KVCache` is made of."""
    _keys_and_values(kv.k, kv.v, ("k", "v"), "[B, G, N, D]")
    _not_repeated("k", kv.k, 1)
    _not_repeated("v", kv.v, 1)
    if kv.k.shape[2] > MAX_POSITION:
        raise ValueError(f"a row must have fewer than 2**31 - 1 slots, got {kv.k.shape[2]}")
    per_row("lengths", kv.lengths, kv.k.shape[0], kv.k.device)
    per_row("starts", kv.starts, kv.k.shape[0], kv.k.device)


def paged_cache(kv: "PagedKVCache") -> None:
    """Check what `PagedKVCache` is made of."""
    if kv.layout not in ("NHD", "HND"):
        raise ValueError(
            "layout must be 'NHD' for [P, page, G, D] or 'HND' for [P, G, page, D], "
            f"got {kv.layout!r}"
        )
    shape = "[P, page, G, D]" if kv.layout == "NHD" else "[P, G, page, D]"
    _keys_and_values(kv.k_pages, kv.v_pages, ("k_pages", "v_pages"), shape)
    head_axis = 2 if kv.layout == "NHD" else 1
    _not_repeated("k_pages", kv.k_pages, head_axis)
    _not_repeated("v_pages", kv.v_pages, head_axis)
    table = tensor("block_table", kv.block_table, 2, "int32 [B, pages]")
    if table.dtype != torch.int32:
        raise TypeError(f"block_table must be int32, got {table.dtype}; use .to(torch.int32)")
    if 0 in table.shape:
        raise ValueError(f"block_table must not be empty, got shape {tuple(table.shape)}")
    same_device("block_table", table, kv.k_pages.device, "k_pages")
    unit_stride("block_table", table)
    if kv.capacity > MAX_POSITION:
        raise ValueError(f"a row must have fewer than 2**31 - 1 slots, got {kv.capacity}")
    if not isinstance(kv.lengths, Tensor):
        raise TypeError(
            f"a paged cache needs lengths, int32 [B], got {type(kv.lengths).__name__}; "
            "its last page is rarely full"
        )
    per_row("lengths", kv.lengths, table.shape[0], table.device)
    per_row("starts", kv.starts, table.shape[0], table.device)


def cache_values(kv: "Cache") -> None:
    """Check the numbers inside lengths, starts and the block table; reads the device."""
    if kv.lengths is not None:
        in_range("lengths", kv.lengths, 0, kv.capacity, "they may not pass the slots of the cache")
    if kv.starts is not None:
        in_range("starts", kv.starts, 0, kv.capacity, "they may not pass the slots of the cache")
    if kv.is_paged:
        _page_ids(kv)  # type: ignore[arg-type]


def _page_ids(kv: "PagedKVCache") -> None:
    table = kv.block_table
    page = torch.arange(table.shape[1], device=table.device)  # [pages]
    used = page * kv.page_size < kv.lengths[:, None]
    if kv.starts is not None:
        used &= (page + 1) * kv.page_size > kv.starts[:, None]
    ids = table[used]
    if ids.numel():
        in_range(
            "page ids",
            ids,
            0,
            kv.k_pages.shape[0] - 1,
            "each page that a row's length reaches needs an id of the pool",
        )


def visual_mask(mask: Tensor, capacity: int | None) -> None:
    """Check the mask of `VisualTokens.from_mask`."""
    tensor("mask", mask, 2, "bool [B, N]")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}; use .bool() or compare the ids")
    if mask.shape[0] == 0:
        raise ValueError("mask must have at least one row")
    _capacity(capacity)


def _capacity(capacity: int | None) -> None:
    if capacity is None:
        return
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise TypeError(f"capacity must be a number of tokens, got {type(capacity).__name__}")
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")


def visual_capacity(largest: int, capacity: int | None) -> None:
    """Check that no row has more visual tokens than the capacity."""
    if capacity is not None and largest > capacity:
        raise ValueError(
            f"a row has {largest} visual tokens, capacity is {capacity}; raise the capacity"
        )


def visual_spans(
    spans: Sequence[Sequence[tuple[int, int]]], capacity: int | None
) -> list[list[tuple[int, int]]]:
    """Check the runs of `VisualTokens.from_spans`; gives them as plain lists."""
    _capacity(capacity)
    if not isinstance(spans, Sequence) or len(spans) == 0:
        raise ValueError("spans must hold one list of (begin, end) per row, got none")
    rows = []
    for b, row in enumerate(spans):
        checked = [_span(b, span) for span in row]
        ordered = sorted(checked)
        for (_, end), (begin, _) in pairwise(ordered):
            if begin < end:
                raise ValueError(f"spans of row {b} overlap at position {begin}; join them first")
        rows.append(checked)
    return rows


def _span(row: int, span: Any) -> tuple[int, int]:
    pair = isinstance(span, Sequence) and len(span) == 2
    if not pair or not all(isinstance(x, int) and not isinstance(x, bool) for x in span):
        raise TypeError(f"a span is a pair (begin, end) of ints, got {span!r} in row {row}")
    begin, end = span
    if not 0 <= begin < end <= MAX_POSITION:
        raise ValueError(
            f"a span needs 0 <= begin < end, got ({begin}, {end}) in row {row}; "
            "leave empty spans out"
        )
    return begin, end


def visual_ids(input_ids: Tensor, ids: int | Sequence[int]) -> list[int]:
    """Check the arguments of `VisualTokens.from_ids`; gives the ids as a list."""
    tensor("input_ids", input_ids, 2, "[B, N]")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
    wanted = [ids] if isinstance(ids, int) else list(ids)
    if not wanted or not all(isinstance(x, int) and not isinstance(x, bool) for x in wanted):
        raise TypeError(f"ids must be a token id or several, got {ids!r}")
    return wanted
