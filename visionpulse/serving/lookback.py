"""What each request kept in its last step, which the layers before the anchor follow in the next.

A request that was away for a step (prefilled, preempted, not scheduled) starts anew with a refresh.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

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
