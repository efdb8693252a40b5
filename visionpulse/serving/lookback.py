"""What each request kept in its last step, which the layers before the anchor follow in the next.

A request that was away for a step (prefilled, preempted, not scheduled) starts anew with a refresh.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..selection import Selection


class Kept:
    """The kept selection of every request of the last step."""

    def __init__(self, refresh: int) -> None:
        self.refresh = refresh  # 0 never refreshes
        self._at: dict[str, tuple[int, int, int]] = {}  # request: its row, length, steps
        self._selection: Selection | None = None

    def follows(self, requests: Sequence[str], lengths: Sequence[int]) -> list[bool]:
        """Whether each row follows its kept selection in this step, else it is dense."""
        return [self._follows(*row) for row in zip(requests, lengths, strict=True)]

    def _follows(self, request: str, length: int) -> bool:
        steps = self._steps(request, length)
        return steps > 0 and not (self.refresh and steps % self.refresh == 0)

    def _steps(self, request: str, length: int) -> int:
        """Steps since the prefill; a length that did not grow by one tells of another prefill."""
        _, last, steps = self._at.get(request, (0, 0, 0))
        return steps if last == length - 1 else 0

    def selection(self, requests: Sequence[str], follows: Sequence[bool]) -> Selection | None:
        """What the rows of this step kept in the last; nothing for a row that does not follow."""
        last = self._selection
        if last is None or not any(follows):
            return None
        rows = [self._at.get(request, (0, 0, 0))[0] for request in requests]
        device = last.counts.device
        if rows != list(range(len(last.counts))):
            last = last.rows(torch.tensor(rows, device=device))
        if not all(follows):  # a position may not be text and kept at once
            counts = last.counts * torch.tensor(follows, device=device)
            last = replace(last, counts=counts)
        return last

    def keep(
        self, requests: Sequence[str], lengths: Sequence[int], selection: Selection | None
    ) -> None:
        """Take what the anchor of this step selected, for all its decode rows."""
        steps = [self._steps(*row) + 1 for row in zip(requests, lengths, strict=True)]
        rows = range(len(requests))
        self._at = dict(zip(requests, zip(rows, lengths, steps, strict=True), strict=True))
        self._selection = selection


class KeptSlots:
    """The same in tensors that stay where they are, for rows of captured graphs.

    Each request has a slot as long as it decodes; one step without it, and it starts anew. The last
    slot is that of rows which keep nothing.
    """

    def __init__(self, refresh: int, max_rows: int, width: int, device: torch.device | str) -> None:
        self.refresh, self.max_rows = refresh, max_rows
        self._at: dict[str, tuple[int, int]] = {}  # request: its slot, steps since the prefill
        with torch.inference_mode(False):
            self._slots = Selection.empty(max_rows + 1, width, device)
            self._rows = Selection.empty(max_rows, width, device)
            # of each row: its slot, and 1 where it follows
            self._table = torch.zeros(2, max_rows, dtype=torch.int64, device=device)
            self._table[0] = max_rows

    def step(self, requests: Sequence[str | None], count: int) -> list[bool]:
        """Begin a step of `count` rows: which of these follow; None keeps nothing."""
        kept = {name: self._at[name] for name in requests if name is not None and name in self._at}
        free = sorted(set(range(self.max_rows)) - {slot for slot, _ in kept.values()})
        slots, follows = [self.max_rows] * count, [False] * count
        self._at = {}
        for row, name in enumerate(requests[:count]):
            if name is None:
                continue
            slot, steps = kept[name] if name in kept else (free.pop(), 0)
            self._at[name] = slot, steps + 1
            slots[row] = slot
            follows[row] = steps > 0 and not (self.refresh and steps % self.refresh == 0)
        written(self._table[:, :count], torch.tensor([slots, follows], dtype=torch.int64))
        return follows

    def first(self, rows: int) -> Selection:
        """What the first rows follow: views, which `read` fills in each step."""
        return self._rows.first(rows)

    def read(self, rows: Selection) -> None:
        """Bring what the rows kept in the last step, nothing where a row does not follow."""
        slots, follows = self._table[:, : len(rows.counts)]
        torch.index_select(self._slots.indices, 0, slots, out=rows.indices)
        torch.index_select(self._slots.counts, 0, slots, out=rows.counts)
        rows.counts.mul_(follows)  # a position may not be text and kept at once

    def write(self, selection: Selection) -> None:
        """Keep what the anchor of this step selected."""
        slots = self._table[0, : len(selection.counts)]
        self._slots.indices.index_copy_(0, slots, selection.indices)
        self._slots.counts.index_copy_(0, slots, selection.counts)


def written(table: Tensor, own: Tensor) -> None:
    """Copy from the host, without waiting for a device."""
    if table.device.type == "cuda":
        own = own.pin_memory()  # a copy: the next step may write `own` at once
    table.copy_(own, non_blocking=True)
