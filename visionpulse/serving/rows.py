"""Which positions of which row are visual, for batches whose rows come and go.

A run is a fact of the prompt: chunked prefill, prefix caching and preemption cannot change it, so a
request's runs are made once.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..visual import NO_SPAN, VisualTokens

Spans = tuple[tuple[int, int], ...]  # maximal runs [begin, end) of one request, ascending
VISUAL = ("image", "video", "vision_chunk")  # not "audio"


class RequestRow(NamedTuple):
    """One request as a step sees it."""

    request: str
    spans: Spans
    wish: Any = None  # what it asks for itself: `setting.of_request` reads it


def spans_of(runs: Iterable[tuple[int, int]]) -> Spans:
    """Runs [begin, end), sorted, and those that touch made one."""
    made: list[tuple[int, int]] = []
    for begin, end in sorted(runs):
        if made and begin <= made[-1][1]:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        else:
            made.append((begin, end))
    return tuple(made)


class Requests:
    """The rows of the requests in an engine; `key` tells a second request of one name apart.

    A key may hold the pictures of its request, so a row goes when its request does.
    """

    def __init__(self) -> None:
        self._rows: dict[str, tuple[Any, RequestRow]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, request: str, key: Any) -> RequestRow | None:
        """The row of a request that `put` has seen with this very key."""
        found = self._rows.get(request)
        return found[1] if found is not None and found[0] is key else None

    def put(self, key: Any, row: RequestRow) -> RequestRow:
        """Remember a row."""
        self._rows[row.request] = key, row
        return row

    def forget_all_but(self, present: Collection[str]) -> None:
        """Forget the rows of requests that the engine has no longer."""
        if len(self._rows) > len(present):
            self._rows = {name: row for name, row in self._rows.items() if name in present}


class SpanTable:
    """The spans of a batch in tensors that stay; a row is written where its request changed.

    `max_runs` grows when a request has more, unless `fixed`: then `fits` must be asked first.
    """

    def __init__(self, rows: int, max_runs: int = 4, *, fixed: bool = False) -> None:
        self.fixed = fixed
        self._make(rows, max_runs)

    def _make(self, rows: int, max_runs: int) -> None:
        with torch.inference_mode(False):
            self.spans = torch.full((rows, max_runs, 2), NO_SPAN, dtype=torch.int32)
            self.offsets = torch.zeros((rows, max_runs + 1), dtype=torch.int32)
            self.counts = torch.zeros(rows, dtype=torch.int32)
        self._loaded: list[Spans] = [()] * rows
        self._last: tuple[tuple[Spans, ...], VisualTokens | None] = ((), None)

    def fits(self, spans: Spans) -> bool:
        """Whether the table has the width for a request."""
        return not self.fixed or len(spans) <= self.spans.shape[1]

    def changed(self, rows: Sequence[Spans]) -> Iterator[int]:
        """Write the rows that differ from what they were; gives their numbers."""
        for i, spans in enumerate(rows):
            if self._loaded[i] == spans:
                continue
            self._write(i, spans)
            yield i

    def _write(self, i: int, spans: Spans) -> None:
        runs = len(spans)
        table = torch.tensor(spans, dtype=torch.int32).view(-1, 2)
        before = (table[:, 1] - table[:, 0]).cumsum(0).to(torch.int32)  # [runs]
        self.spans[i, :runs], self.spans[i, runs:] = table, NO_SPAN
        self.offsets[i, 1 : runs + 1] = before
        self.offsets[i, runs + 1 :] = self.counts[i] = sum(end - begin for begin, end in spans)
        self._loaded[i] = spans

    def load(self, rows: Sequence[Spans]) -> VisualTokens | None:
        """The visual tokens of a batch; None where no row has any. Views of the table."""
        key = tuple(rows)
        if self._last[0] == key:
            return self._last[1]
        most = max(map(len, key), default=0)
        if most > self.spans.shape[1] or len(key) > len(self.spans):
            self._make(max(len(key), len(self.spans)), max(most, 2 * self.spans.shape[1]))
        for _ in self.changed(key):
            pass
        n, visual = len(key), None
        if most:
            counts = [sum(end - begin for begin, end in spans) for spans in key]
            size = max(spans[-1][1] for spans in key if spans)
            visual = VisualTokens(
                self.spans[:n], self.offsets[:n], self.counts[:n], max(counts), size
            )
        self._last = key, visual
        return visual
