"""Keys and values of one layer, contiguous or in pages.

Immutable, checked when made, so a kernel may trust shapes and strides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .float8 import FLOAT8
from .tensor_checks import MAX_POSITION, in_range, per_row, same_device, tensor, unit_stride

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, FLOAT8)
MAX_HEAD_DIM = 256
MAX_GROUP = 32  # query heads of one KV head
MAX_QUERIES = 16  # queries of one row in a call
_LAYOUTS = {"NHD": ("[P, page, G, D]", 2, 1), "HND": ("[P, G, page, D]", 1, 2)}


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of one layer, a row of the batch per sequence.

    `starts` and `lengths` cut the visible keys of a row, `start <= n < length`; None means 0 and N.
    K and V of `torch.float8_e4m3fn` stand for themselves times `k_scale` and `v_scale`, float32 of
    one number or of [G]; None means 1. `vp.float8.stored` makes them.
    """

    k: Tensor  # [B, G, N, D], any strides with a unit last one
    v: Tensor  # [B, G, N, D]
    lengths: Tensor | None = None  # int32 [B]
    starts: Tensor | None = None  # int32 [B]
    k_scale: Tensor | None = None  # float32, one number or [G]
    v_scale: Tensor | None = None  # the same

    is_paged = False
    page_size = 0
    head_axis = 1

    def __post_init__(self) -> None:
        _keys_and_values(self.k, self.v, ("k", "v"), "[B, G, N, D]", 1)
        _scales(self)
        _cut(self, self.k.device)

    @property
    def k_data(self) -> Tensor:
        """The tensor that holds the keys."""
        return self.k

    @property
    def v_data(self) -> Tensor:
        """The tensor that holds the values."""
        return self.v

    @property
    def batch(self) -> int:
        """B."""
        return self.k.shape[0]

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """N, the slots of a row."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.k.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        """The device of keys and values."""
        return self.k.device

    @property
    def k_strides(self) -> tuple[int, int, int]:
        """Elements from one row, KV head and token to the next."""
        return self.k.stride()[:3]  # type: ignore[return-value]

    @property
    def v_strides(self) -> tuple[int, int, int]:
        """Elements from one row, KV head and token to the next."""
        return self.v.stride()[:3]  # type: ignore[return-value]

    def validate(self) -> None:
        """Check lengths, starts and scales; reads the device, so never called in a step."""
        _cut_values(self)
        _scale_values(self)


@dataclass(frozen=True, eq=False)
class PagedKVCache:
    """Keys and values in pages: position p of a row is slot `p % page` of page `table[p // page]`.

    Layout "NHD" is [P, page, G, D], "HND" is [P, G, page, D].
    """

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor  # int32 [B, pages]
    lengths: Tensor  # int32 [B]
    starts: Tensor | None = None  # int32 [B]
    layout: str = "NHD"
    k_scale: Tensor | None = None  # float32, one number or [G], as in KVCache
    v_scale: Tensor | None = None  # the same

    is_paged = True

    def __post_init__(self) -> None:
        if self.layout not in _LAYOUTS:
            raise ValueError(
                "layout must be 'NHD' for [P, page, G, D] or 'HND' for [P, G, page, D], "
                f"got {self.layout!r}"
            )
        shape, head_axis, _ = _LAYOUTS[self.layout]
        names = ("k_pages", "v_pages")
        _keys_and_values(self.k_pages, self.v_pages, names, shape, head_axis)
        _scales(self)
        table = tensor("block_table", self.block_table, 2, "int32 [B, pages]")
        if table.dtype != torch.int32:
            raise TypeError(f"block_table must be int32, got {table.dtype}; use .to(torch.int32)")
        if 0 in table.shape:
            raise ValueError(f"block_table must not be empty, got shape {tuple(table.shape)}")
        same_device("block_table", table, self.k_pages.device, "k_pages")
        unit_stride("block_table", table)
        if not isinstance(self.lengths, Tensor):
            raise TypeError(
                f"a paged cache needs lengths, int32 [B], got {type(self.lengths).__name__}; "
                "its last page is rarely full"
            )
        _cut(self, table.device)

    @property
    def k_data(self) -> Tensor:
        """The tensor that holds the keys."""
        return self.k_pages

    @property
    def v_data(self) -> Tensor:
        """The tensor that holds the values."""
        return self.v_pages

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k_pages.shape[_LAYOUTS[self.layout][2]]

    @property
    def head_axis(self) -> int:
        """The axis of the KV heads in the tensors that hold keys and values."""
        return _LAYOUTS[self.layout][1]

    @property
    def batch(self) -> int:
        """B."""
        return self.block_table.shape[0]

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.k_pages.shape[self.head_axis]

    @property
    def capacity(self) -> int:
        """N, the slots that a row's block table can reach."""
        return self.block_table.shape[1] * self.page_size

    @property
    def head_dim(self) -> int:
        """D."""
        return self.k_pages.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.k_pages.dtype

    @property
    def device(self) -> torch.device:
        """The device of keys and values."""
        return self.k_pages.device

    @property
    def k_strides(self) -> tuple[int, int, int]:
        """Elements from one page, KV head and slot to the next."""
        return self._strides(self.k_pages)

    @property
    def v_strides(self) -> tuple[int, int, int]:
        """Elements from one page, KV head and slot to the next."""
        return self._strides(self.v_pages)

    def _strides(self, pages: Tensor) -> tuple[int, int, int]:
        slot_axis = _LAYOUTS[self.layout][2]
        return pages.stride(0), pages.stride(self.head_axis), pages.stride(slot_axis)

    def validate(self) -> None:
        """Check lengths, starts, page ids, scales; reads the device, so never called in a step."""
        _cut_values(self)
        _scale_values(self)
        _page_ids(self)


Cache = KVCache | PagedKVCache


def _keys_and_values(
    k: Tensor, v: Tensor, names: tuple[str, str], shape: str, head_axis: int
) -> None:
    tensor(names[0], k, 4, shape)
    tensor(names[1], v, 4, shape)
    if k.dtype not in DTYPES:
        raise TypeError(
            f"the cache must be float32, bfloat16, float16 or float8_e4m3fn, got {k.dtype}; "
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
    for name, value in zip(names, (k, v), strict=True):
        unit_stride(name, value)
        if value.shape[head_axis] > 1 and value.stride(head_axis) == 0:
            raise ValueError(
                f"{name} repeats one head {value.shape[head_axis]} times (head stride 0); "
                "pass K and V before they are repeated per query head, [B, G, N, D]"
            )


def _cut(kv: Cache, device: torch.device) -> None:
    if kv.capacity > MAX_POSITION:
        raise ValueError(f"a row must have fewer than 2**31 - 1 slots, got {kv.capacity}")
    per_row("lengths", kv.lengths, kv.batch, device)
    per_row("starts", kv.starts, kv.batch, device)


def _scales(kv: Cache) -> None:
    for name, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        if scale is None:
            continue
        shape = f"float32 of one number or [G={kv.kv_heads}]"
        if not isinstance(scale, Tensor):
            raise TypeError(
                f"{name} must be a tensor, {shape}, got {type(scale).__name__}; "
                "make it once: torch.tensor(scale, device=k.device)"
            )
        if kv.dtype != FLOAT8:
            raise TypeError(
                f"{name} belongs to a cache of float8_e4m3fn, got one of {kv.dtype}; leave it out"
            )
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {scale.dtype}; use .float()")
        if scale.dim() > 1 or scale.numel() not in (1, kv.kv_heads):
            raise ValueError(
                f"{name} must be {shape}, got shape {tuple(scale.shape)}; "
                "the slots of a head share a scale"
            )
        same_device(name, scale, kv.device, "the cache")
        if not scale.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {scale.stride()}")


def _scale_values(kv: Cache) -> None:
    for name, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        if scale is not None and not ((scale > 0) & (scale < torch.inf)).all():
            raise ValueError(
                f"{name} must be finite and above 0, got {scale.tolist()}; "
                "for a head of zeros any scale will do, such as 1"
            )


def _cut_values(kv: Cache) -> None:
    for name, value in (("lengths", kv.lengths), ("starts", kv.starts)):
        if value is not None:
            in_range(name, value, 0, kv.capacity, "they may not pass the slots of the cache")


def _page_ids(kv: PagedKVCache) -> None:
    table = kv.block_table
    page = torch.arange(table.shape[1], device=table.device)  # [pages]
    used = page * kv.page_size < kv.lengths[:, None]
    if kv.starts is not None:
        used &= (page + 1) * kv.page_size > kv.starts[:, None]
    ids = table[used]
    if ids.numel():
        way_out = "each page that a row's length reaches needs an id of the pool"
        in_range("page ids", ids, 0, kv.k_pages.shape[0] - 1, way_out)
