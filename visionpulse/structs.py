"""The objects that cross layers: the cache, the visual set, the selection, and one call's numbers.

All four are immutable and hold tensors on the device; none reads the device after it is built.
Their arguments are checked when they are made, so a kernel may trust shapes and strides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import struct_checks as checks

NO_SPAN = 2**31 - 1  # begin and end of the empty spans behind a row's last: the list stays sorted


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of one layer, a row of the batch per sequence.

    `starts` and `lengths` cut the visible keys of a row, `start <= n < length`; None means 0 and N.
    """

    k: Tensor  # [B, G, N, D], any strides with a unit last one
    v: Tensor  # [B, G, N, D]
    lengths: Tensor | None = None  # int32 [B]
    starts: Tensor | None = None  # int32 [B]

    def __post_init__(self) -> None:
        checks.contiguous_cache(self)

    is_paged = False
    page_size = 0

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
        """Check the values of lengths and starts; reads the device, so never called in a step."""
        checks.cache_values(self)


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

    def __post_init__(self) -> None:
        checks.paged_cache(self)

    is_paged = True

    @property
    def _axes(self) -> tuple[int, int]:
        """Axes of the KV head and of the slot."""
        return (2, 1) if self.layout == "NHD" else (1, 2)

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
        return self.k_pages.shape[self._axes[1]]

    @property
    def batch(self) -> int:
        """B."""
        return self.block_table.shape[0]

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.k_pages.shape[self._axes[0]]

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

    def _strides(self, pages: Tensor) -> tuple[int, int, int]:
        head, slot = self._axes
        return pages.stride(0), pages.stride(head), pages.stride(slot)

    @property
    def k_strides(self) -> tuple[int, int, int]:
        """Elements from one page, KV head and slot to the next."""
        return self._strides(self.k_pages)

    @property
    def v_strides(self) -> tuple[int, int, int]:
        """Elements from one page, KV head and slot to the next."""
        return self._strides(self.v_pages)

    def validate(self) -> None:
        """Check lengths, starts and page ids; reads the device, so never called in a step."""
        checks.cache_values(self)


Cache = KVCache | PagedKVCache


@dataclass(frozen=True, eq=False, repr=False)
class VisualTokens:
    """Which positions of each row hold image or video tokens, as runs kept on the device.

    Made by `from_mask`, `from_spans` or `from_ids`, which may read the device once. `capacity`
    fixes K_max and every shape, so that one compiled graph serves several prompts.
    """

    spans: Tensor  # int32 [B, S, 2], ascending maximal runs [begin, end), then NO_SPAN
    offsets: Tensor  # int32 [B, S + 1], visual tokens of the row before each run
    counts: Tensor  # int32 [B]
    max_count: int  # the largest count of a row, or the capacity
    size: int  # positions covered; all beyond are text

    @property
    def batch(self) -> int:
        """B."""
        return self.spans.shape[0]

    @property
    def device(self) -> torch.device:
        """The device the runs are kept on."""
        return self.spans.device

    def __repr__(self) -> str:
        return (
            f"VisualTokens(rows={self.batch}, max_count={self.max_count}, "
            f"spans<={self.spans.shape[1]}, size={self.size}, device={self.device})"
        )

    @classmethod
    def from_mask(cls, mask: Tensor, capacity: int | None = None) -> "VisualTokens":
        """Take the True positions of a bool mask [B, N]."""
        checks.visual_mask(mask, capacity)
        edge = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff(dim=1)  # [B, N + 1]
        begins = (edge == 1).nonzero()  # [runs, 2] of (row, position), ascending
        ends = (edge == -1).nonzero()[:, 1]
        rows = begins[:, 0]
        runs = torch.bincount(rows, minlength=mask.shape[0])  # [B]
        rank = torch.arange(len(rows), device=mask.device) - (runs.cumsum(0) - runs)[rows]
        spans = _no_spans(mask.shape[0], int(runs.max()), capacity, mask.device)
        spans[rows, rank] = torch.stack((begins[:, 1], ends), dim=1).to(torch.int32)
        return cls._from_runs(spans, mask.shape[1], capacity)

    @classmethod
    def from_spans(
        cls,
        spans: Sequence[Sequence[tuple[int, int]]],
        capacity: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "VisualTokens":
        """Take runs [begin, end) per row, in any order, that do not overlap."""
        rows = [_joined(row) for row in checks.visual_spans(spans, capacity)]
        table = _no_spans(len(rows), max(map(len, rows)), capacity, torch.device("cpu"))
        for b, row in enumerate(rows):
            if row:
                table[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
        size = max((end for row in rows for _, end in row), default=0)
        return cls._from_runs(table, size, capacity).to(device)

    @classmethod
    def from_ids(
        cls, input_ids: Tensor, ids: int | Sequence[int], capacity: int | None = None
    ) -> "VisualTokens":
        """Take the positions of `input_ids` [B, N] that hold one of the placeholder `ids`."""
        wanted = checks.visual_ids(input_ids, ids)
        return cls.from_mask(torch.isin(input_ids, input_ids.new_tensor(wanted)), capacity)

    @classmethod
    def _from_runs(cls, spans: Tensor, size: int, capacity: int | None) -> "VisualTokens":
        widths = spans[:, :, 1] - spans[:, :, 0]  # [B, S]
        offsets = torch.nn.functional.pad(widths.cumsum(1), (1, 0)).to(torch.int32)
        counts = offsets[:, -1].contiguous()
        largest = int(counts.max())
        checks.visual_capacity(largest, capacity)
        return cls(spans, offsets, counts, largest if capacity is None else capacity, size)

    def mask(self, size: int) -> Tensor:
        """Give the set back as bool [B, size], without reading the device."""
        positions = torch.arange(size, dtype=torch.int32, device=self.device)
        begins, ends = self.spans.unbind(2)  # [B, S]
        run = torch.searchsorted(
            begins.contiguous(), positions.expand(self.batch, -1).contiguous(), right=True
        )
        end = ends.gather(1, (run - 1).clamp(min=0))  # [B, size]
        return (run > 0) & (positions < end)

    def visible_counts(
        self, size: int, starts: Tensor | None, lengths: Tensor | None, window: int
    ) -> Tensor:
        """N_v of each row, the visual tokens inside starts, lengths and window: int32 [B]."""
        end = torch.full_like(self.counts, size) if lengths is None else lengths.clamp(0, size)
        begin = torch.zeros_like(end) if starts is None else starts
        if window:
            begin = torch.maximum(begin, end - window)
        begins, ends = self.spans.unbind(2)  # [B, S]
        width = torch.minimum(ends, end[:, None]) - torch.maximum(begins, begin[:, None])
        return width.clamp(min=0).sum(1, dtype=torch.int32)

    def rows(self, index: Tensor) -> "VisualTokens":
        """Take rows by an index tensor, in its order and as often as it names them."""
        spans, offsets, counts = (t[index] for t in (self.spans, self.offsets, self.counts))
        return VisualTokens(spans, offsets, counts, self.max_count, self.size)

    def to(self, device: torch.device | str) -> "VisualTokens":
        """Copy to a device; the same object when already there."""
        if self.device == torch.device(device):
            return self
        spans, offsets, counts = (t.to(device) for t in (self.spans, self.offsets, self.counts))
        return VisualTokens(spans, offsets, counts, self.max_count, self.size)


@dataclass(frozen=True, eq=False)
class Selection:
    """What the anchor kept: the one object that crosses layers, always on the device."""

    indices: Tensor  # int32 [B, K_max], ascending, -1 padded; logical positions
    counts: Tensor  # int32 [B]
    mass: Tensor  # float32 [B], the largest of the heads
    mass_mean: Tensor  # float32 [B]
    # Made by a backend, so the values need no check; one made by hand is checked when used.
    trusted: bool = field(default=False, repr=False)

    def rows(self, index: Tensor) -> "Selection":
        """Take rows by an index tensor, in its order and as often as it names them."""
        tensors = (self.indices, self.counts, self.mass, self.mass_mean)
        indices, counts, mass, mass_mean = (tensor[index] for tensor in tensors)
        return Selection(indices, counts, mass, mass_mean, self.trusted)

    def to(self, device: torch.device | str) -> "Selection":
        """Copy to a device; the same object when already there."""
        if self.indices.device == torch.device(device):
            return self
        tensors = (self.indices, self.counts, self.mass, self.mass_mean)
        indices, counts, mass, mass_mean = (tensor.to(device) for tensor in tensors)
        return Selection(indices, counts, mass, mass_mean, self.trusted)


class Params(NamedTuple):
    """The numbers of one call, resolved from a config and the arguments of the op."""

    scale: float
    softcap: float = 0.0  # 0 is none
    window: int = 0  # 0 is none
    tau: float = 1.0
    r_min: float = 0.0
    r_max: float = 1.0
    mass_of: str = "max"  # which mass sets the budget
    score: str = "prob"
    anchor_output: str = "pruned"
    k_max: int = 1
    ratio: Tensor | None = None  # float32 [B], stands in for the mass
    wanted: Tensor | None = None  # int32 [B], stands in for the whole budget


def _no_spans(rows: int, runs: int, capacity: int | None, device: torch.device) -> Tensor:
    """A span table without spans: as wide as the widest row, or as the capacity can ever need."""
    width = max(1, runs if capacity is None else max(runs, capacity))
    return torch.full((rows, width, 2), NO_SPAN, dtype=torch.int32, device=device)


def _joined(row: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted runs with neighbours that touch made one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(row):
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
