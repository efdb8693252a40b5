"""What a worker counts: summed on the device in a step, read by a thread of its own between steps.

A step adds to tensors in place, so a CUDA graph may hold it. Nothing in a step waits for a number.
"""

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..selection import Selection
from ..visual import VisualTokens

# Upper edges of the histograms; one more bucket holds what lies above.
RETENTION = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
MASS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
AT_ONCE = 256  # selections of a CPU that are added up together


@dataclass(frozen=True)
class Histogram:
    """Counts by bucket, those of lower buckets left out, and the sum of the values."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]  # one more than edges
    sum: float


@dataclass(frozen=True)
class Totals:
    """Since the worker began; a decode row is one row of one step."""

    sparse_rows: int = 0
    dense_rows: Mapping[str, int] = field(default_factory=dict)  # by reason
    visual: int = 0  # visual tokens of the rows at their anchors
    kept: int = 0
    retention: Histogram = Histogram(RETENTION, (0,) * (len(RETENTION) + 1), 0.0)
    mass: Histogram = Histogram(MASS, (0,) * (len(MASS) + 1), 0.0)


class Counters:
    """The sums of one worker. `step` and `selected` are called in a step, `totals` outside."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._rows: Counter[str] = Counter()  # by reason, "" where sparse
        self._steps = 0
        self.counts_rows = True  # False in pipeline stages behind the first with an anchor
        self._device = torch.device(device).type
        self._pending: deque[Tensor] = deque()  # float32 [3, rows], of a CPU
        self._adds = threading.Lock()
        with torch.inference_mode(False):
            # visual, kept, sum of retentions, sum of masses, then the buckets of both
            self._sums = torch.zeros(
                4 + len(RETENTION) + 1 + len(MASS) + 1, dtype=torch.float64, device=device
            )
            self._retention = torch.tensor(RETENTION, device=device)
            self._mass = torch.tensor(MASS, device=device)

    def step(self, sparse: int, dense: Mapping[str, int]) -> None:
        """Count the decode rows of a step as the host knows them, the dense ones by reason."""
        if self.counts_rows:
            self._rows[""] += sparse
            self._rows.update(dense)
        self._steps += 1

    def selected(self, selection: Selection, visual: VisualTokens) -> None:
        """Add what an anchor kept; rows without visual tokens are left out, on the device.

        On a CPU the numbers alone are copied, and many selections are added at once: a dozen small
        ops at each anchor would be seen in a step.
        """
        candidates, rows = visual.counts, len(selection.counts)
        if rows != len(candidates):  # several queries a row
            candidates = candidates.repeat_interleave(rows // len(candidates))
        seen = torch.stack((candidates, selection.counts, selection.mass))
        if self._device != "cpu":
            self._add(seen)
            return
        self._pending.append(seen)
        if len(self._pending) >= AT_ONCE:
            self._add_pending()

    def forget(self) -> None:
        """Count from nothing again: what ran was no request's."""
        self._pending.clear()
        self._rows.clear()
        self._sums.zero_()

    def _add_pending(self) -> None:
        with self._adds:  # the thread that publishes adds too
            pending = [self._pending.popleft() for _ in range(len(self._pending))]
            if pending:
                self._add(torch.cat(pending, dim=1))

    def _add(self, seen: Tensor) -> None:
        """Add columns of candidates, kept and mass."""
        candidates, kept, mass = seen
        has = (candidates > 0).double()
        share, mass = kept / candidates.clamp(min=1), torch.nan_to_num(mass)
        values = torch.stack([candidates, kept, share, mass]).double()
        self._sums[:4].add_((values * has).sum(1))
        first = 4 + len(RETENTION) + 1
        buckets = [
            torch.bucketize(share, self._retention) + 4,
            torch.bucketize(mass, self._mass) + first,
        ]
        self._sums.index_add_(0, torch.cat(buckets), has.repeat(2))

    @property
    def steps(self) -> int:
        """Steps so far: whoever publishes skips what has not changed."""
        return self._steps

    def totals(self) -> Totals:
        """Read the sums; on a GPU by a stream of its own, so that the step is not waited for."""
        self._add_pending()
        sums = _copied(self._sums).tolist()
        split = 4 + len(RETENTION) + 1
        rows = dict(self._rows)
        return Totals(
            rows.pop("", 0), {why: count for why, count in rows.items() if count},
            round(sums[0]), round(sums[1]),
            Histogram(RETENTION, tuple(map(round, sums[4:split])), sums[2]),
            Histogram(MASS, tuple(map(round, sums[split:])), sums[3]),
        )  # fmt: skip


class Publisher:
    """A thread that hands the totals on, once a period and only where a step has run.

    It ends with the counters.
    """

    def __init__(
        self, counters: Counters, publish: Callable[[Totals], bool], period: float = 1.0
    ) -> None:
        self._counters, self._publish, self._period = weakref.ref(counters), publish, period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="visionpulse-stats", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publish a last time and end."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        seen, stopped = 0, False
        while not stopped:
            stopped = self._stop.wait(self._period)
            counters = self._counters()
            if counters is None:
                return
            steps = counters.steps
            # what is not taken now (`False`) is offered again
            if steps != seen and self._publish(counters.totals()):
                seen = steps
            del counters


def _copied(sums: Tensor) -> Tensor:
    if sums.device.type != "cuda":
        return sums.clone()
    stream: Any = torch.cuda.Stream
    with torch.cuda.stream(stream(sums.device)):
        return sums.cpu()
