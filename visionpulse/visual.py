"""Which positions hold image or video tokens, as runs kept on the device.

Immutable, its arguments checked when it is made; building may read the device, a step does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .tensor_checks import MAX_POSITION, has_storage, same_device, tensor

NO_SPAN = 2**31 - 1  # begin and end of the empty spans behind a row's last: the list stays sorted


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
    # The tables are the caller's, who may write them between two calls: see `over`.
    is_borrowed: bool = False

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
        tensor("mask", mask, 2, "bool [B, N]")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}; use .bool() or compare the ids")
        if mask.shape[0] == 0:
            raise ValueError("mask must have at least one row")
        _check_capacity(capacity)
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
        _check_capacity(capacity)
        if not isinstance(spans, Sequence) or len(spans) == 0:
            raise ValueError("spans must hold one list of (begin, end) per row, got none")
        rows = [_runs_of(b, row) for b, row in enumerate(spans)]
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
        tensor("input_ids", input_ids, 2, "[B, N]")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
        wanted = [ids] if isinstance(ids, int) else list(ids)
        if not wanted or not all(map(_is_int, wanted)):
            raise TypeError(f"ids must be a token id or several, got {ids!r}")
        return cls.from_mask(torch.isin(input_ids, input_ids.new_tensor(wanted)), capacity)

    @classmethod
    def over(cls, spans: Tensor, offsets: Tensor, counts: Tensor, capacity: int) -> "VisualTokens":
        """Stand over tables that the caller owns and writes between steps, as graphs need.

        `spans` int32 [B, max_runs, 2], `offsets` int32 [B, max_runs + 1] and `counts` int32 [B]
        hold in each row what `span_row` gives; `capacity` is the most visual tokens of a row and
        fixes K_max. A row of count 0 has none, so its attention is dense. A call looks at the
        values where they lie on the CPU; on a device only `validate` does.
        """
        _check_tables(spans, offsets, counts)
        if capacity is None:
            raise TypeError("tables of the caller need a capacity, got None; K_max follows from it")
        _check_capacity(capacity)
        return cls(spans, offsets, counts, capacity, size=0, is_borrowed=True)

    @classmethod
    def _from_runs(cls, spans: Tensor, size: int, capacity: int | None) -> "VisualTokens":
        widths = spans[:, :, 1] - spans[:, :, 0]  # [B, S]
        offsets = torch.nn.functional.pad(widths.cumsum(1), (1, 0)).to(torch.int32)
        counts = offsets[:, -1].contiguous()
        largest = int(counts.max())
        _check_capacity(capacity, largest)
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

    def validate(self) -> None:
        """Check the values of the tables; reads the device, so never called in a step there."""
        begins, ends = self.spans.unbind(2)  # [B, S]
        used = begins != NO_SPAN
        before = torch.nn.functional.pad(ends[:, :-1], (1, 0), value=-1)
        fits = torch.where(used, (begins > before) & (ends > begins), ends == NO_SPAN)
        if not bool(fits.all()):
            raise ValueError(
                "visual.spans must hold ascending runs [begin, end) that do not touch, then "
                f"{NO_SPAN} twice a run; fill each row with what span_row gives"
            )
        sums = torch.nn.functional.pad((ends - begins).cumsum(1), (1, 0))
        if not (
            torch.equal(self.offsets.long(), sums) and torch.equal(self.counts.long(), sums[:, -1])
        ):
            raise ValueError(
                "visual.offsets must hold the visual tokens before each run, and visual.counts "
                "those of the row; fill each row with what span_row gives"
            )
        _check_capacity(self.max_count, int(self.counts.max()))

    def first(self, rows: int) -> "VisualTokens":
        """Give the first rows alone, over the same memory."""
        return self._each(lambda t: t[:rows])

    def rows(self, index: Tensor) -> "VisualTokens":
        """Take rows by an index tensor, in its order and as often as it names them."""
        return self._each(lambda t: t[index])

    def to(self, device: torch.device | str) -> "VisualTokens":
        """Copy to a device; the same object when already there."""
        if self.device == torch.device(device):
            return self
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "VisualTokens":
        spans, offsets, counts = change(self.spans), change(self.offsets), change(self.counts)
        return VisualTokens(spans, offsets, counts, self.max_count, self.size, self.is_borrowed)


def span_row(
    runs: Sequence[tuple[int, int]], max_runs: int
) -> tuple[list[tuple[int, int]], list[int], int]:
    """One row of the tables that `VisualTokens.over` takes: its spans, offsets and count.

    `runs` are [begin, end), in any order, that do not overlap; without any the row has count 0.
    """
    spans = _runs_of(0, runs)
    if len(spans) > max_runs:
        raise ValueError(
            f"a row has {len(spans)} runs of visual tokens, the table {max_runs}; raise max_runs"
        )
    offsets = [0, *accumulate(end - begin for begin, end in spans)]
    unused = max_runs - len(spans)
    return spans + [(NO_SPAN, NO_SPAN)] * unused, offsets + offsets[-1:] * unused, offsets[-1]


def _check_tables(spans: Tensor, offsets: Tensor, counts: Tensor) -> None:
    """Check the tables of a caller: shape, dtype, device and strides."""
    tensor("spans", spans, 3, "int32 [B, max_runs, 2]")
    rows, runs, pair = spans.shape
    if rows == 0 or runs == 0 or pair != 2:
        raise ValueError(f"spans must be int32 [B, max_runs, 2], got shape {tuple(spans.shape)}")
    tensor("offsets", offsets, 2, "int32 [B, max_runs + 1]")
    tensor("counts", counts, 1, "int32 [B]")
    wanted = {"spans": (rows, runs, 2), "offsets": (rows, runs + 1), "counts": (rows,)}
    for (name, shape), table in zip(wanted.items(), (spans, offsets, counts), strict=True):
        if tuple(table.shape) != shape:
            raise ValueError(f"{name} must be {shape} beside the spans, got {tuple(table.shape)}")
        if table.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {table.dtype}; use .to(torch.int32)")
        same_device(name, table, spans.device, "spans")
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {table.stride()}")
        has_storage((name, table))


def _no_spans(rows: int, runs: int, capacity: int | None, device: torch.device) -> Tensor:
    """A span table without spans: as wide as the widest row, or as the capacity can ever need."""
    width = max(1, runs if capacity is None else max(runs, capacity))
    return torch.full((rows, width, 2), NO_SPAN, dtype=torch.int32, device=device)


def _check_capacity(capacity: int | None, largest: int = 0) -> None:
    """Check a capacity, and that no row has more visual tokens."""
    if capacity is None:
        return
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise TypeError(f"capacity must be a number of tokens, got {type(capacity).__name__}")
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    if largest > capacity:
        raise ValueError(
            f"a row has {largest} visual tokens, capacity is {capacity}; raise the capacity"
        )


def _runs_of(b: int, row: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Row `b` checked, sorted, and runs that touch made one."""
    runs: list[tuple[int, int]] = []
    for begin, end in sorted([_checked_span(b, span) for span in row]):
        if runs and begin < runs[-1][1]:
            raise ValueError(f"spans of row {b} overlap at position {begin}; join them first")
        if runs and begin == runs[-1][1]:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return runs


def _checked_span(b: int, span: Any) -> tuple[int, int]:
    pair = isinstance(span, Sequence) and len(span) == 2
    if not pair or not all(map(_is_int, span)):
        raise TypeError(f"a span is a pair (begin, end) of ints, got {span!r} in row {b}")
    begin, end = span
    if not 0 <= begin < end <= MAX_POSITION:
        raise ValueError(
            f"a span needs 0 <= begin < end, got ({begin}, {end}) in row {b}; leave empty spans out"
        )
    return begin, end


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
