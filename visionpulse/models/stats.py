"""What a session counts: on the device while it runs, summed up only when it is read."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..selection import Selection
from ..trace.record import Entry
from .conversation import Conversation
from .float8_layers import Clamped
from .notices import DenseReason

QUANTITIES = ("retention", "kept", "mass", "mass_mean")
PENDING = 4096  # selections held before they are summed up; each holds a few numbers per row


@dataclass(frozen=True)
class Summary:
    """One quantity over all rows and selections."""

    mean: float
    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.min:.4g} .. {self.max:.4g})"


_NONE = Summary(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class Stats:
    """What the steps of a session kept; rows without visual tokens are left out."""

    steps: int  # decode steps in which an anchor selected visual tokens
    rows: int  # selections, a row of the batch each
    retention: Summary = _NONE  # K / N_v
    kept: Summary = _NONE  # K
    mass: Summary = _NONE  # of the head with the largest
    mass_mean: Summary = _NONE  # of all heads
    dense: dict[str, int] = field(default_factory=dict)  # other decode steps, by reason
    checks: int = 0  # of lossless decoding, of a row each: one token and those that it accepts
    drafted: int = 0  # tokens
    accepted: int = 0  # of the drafted tokens
    clamped: int = 0  # numbers of keys and values that the scales of an 8-bit cache did not hold

    @property
    def rejected(self) -> int:
        """Drafted tokens that were not used."""
        return self.drafted - self.accepted

    @property
    def tokens_per_check(self) -> float:
        """Tokens that one dense forward gave on average."""
        return (self.checks + self.accepted) / self.checks if self.checks else float("nan")

    @property
    def ran(self) -> str:
        """The decode steps that ran, in words."""
        if not self.steps and not self.dense:
            return "nothing yet"
        why = ", ".join(f"{count} {reason}" for reason, count in self.dense.items())
        return f"{self.steps} sparse, {sum(self.dense.values())} dense steps" + (
            f" ({why})" if why else ""
        )

    def __str__(self) -> str:
        text = f"{self.steps} sparse decode steps"
        if self.rows:
            text += f", retention {self.retention}, K {self.kept}, mass {self.mass}"
        if self.checks:
            text += f", {self.accepted} of {self.drafted} drafted tokens accepted"
            text += f", {self.tokens_per_check:.3g} tokens a check"
        if self.clamped:
            text += f", {self.clamped} numbers clamped in the cache"
        return text + "".join(f", {count} dense: {why}" for why, count in self.dense.items())


class _Sums:
    """Sums of one device, float64: [quantity] each, and the steps by kind."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.total = torch.zeros(4, dtype=torch.float64, device=device)
            self.low = torch.full((4,), torch.inf, dtype=torch.float64, device=device)
            self.high = torch.full((4,), -torch.inf, dtype=torch.float64, device=device)
            self.tally = torch.zeros(2, dtype=torch.float64, device=device)  # steps, rows
            self.dense = torch.zeros(len(DenseReason), dtype=torch.float64, device=device)
        for buffer in (self.total, self.low, self.high, self.tally, self.dense):
            # a graph may then write them in place
            torch._dynamo.mark_static_address(buffer)

    def add(
        self, counts: Tensor, mass: Tensor, mass_mean: Tensor, inverse: Tensor, first: list[bool]
    ) -> None:
        """Add the rows [n] of some selections of one batch; the first of a step counts it."""
        has_visual = inverse > 0  # [n]
        none = ~has_visual
        values = torch.stack((counts * inverse, counts, mass, mass_mean)).double()  # [4, n]
        self.total.add_(values.masked_fill(none, 0.0).sum(1))
        self.low.copy_(torch.minimum(self.low, values.masked_fill(none, torch.inf).amin(1)))
        self.high.copy_(torch.maximum(self.high, values.masked_fill(none, -torch.inf).amax(1)))
        if any(first):
            steps = torch.stack([part.any() for part in has_visual.chunk(len(first))])
            if not all(first):
                steps = steps[torch.tensor(first, device=steps.device)]
            self.tally[0].add_(steps.sum())
            self.dense[0].add_((~steps).sum())  # a static cache has a set without a picture too
        self.tally[1].add_(has_visual.sum())

    def reset(self) -> None:
        self.total.zero_()
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)
        self.tally.zero_()
        self.dense.zero_()


_REASON_INDEX = {reason: i for i, reason in enumerate(DenseReason)}


class Recorder:
    """Takes every selection of a session; eager steps only append to a list."""

    def __init__(self, record: bool) -> None:
        self.record = record
        self.entries: list[Entry] = []
        self.clamped = Clamped()
        self._sums: dict[torch.device, _Sums] = {}
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor, bool]] = []
        self._dense: Counter[DenseReason] = Counter()
        self._rounds = [0, 0, 0]  # checks, drafted and accepted tokens
        self._lock = threading.Lock()

    def prepare(self, device: torch.device) -> None:
        """Make the sums of a device, because a compiled step cannot."""
        if device not in self._sums:
            with self._lock:
                self._sums.setdefault(device, _Sums(device))

    def add(
        self,
        selection: Selection,
        conversation: Conversation,
        is_first: bool,
        step: tuple[int, int, Tensor | None],
    ) -> None:
        """Take an anchor's selection; `step` is its number, layer and token."""
        inverse = conversation.inverse
        if inverse is None:
            return
        counts, mass, mass_mean = selection.counts, selection.mass, selection.mass_mean
        if torch.compiler.is_compiling():
            self._sums[counts.device].add(counts, mass, mass_mean, inverse, [is_first])
            return
        self._pending.append((counts, mass, mass_mean, inverse, is_first))
        visual = conversation.visual
        if self.record and visual is not None:
            self.entries.append(Entry(selection, visual, conversation.number, *step))
        if len(self._pending) >= PENDING:
            self._fold()

    def add_dense(self, reason: DenseReason, device: torch.device) -> None:
        """Count a decode step that pruned nothing."""
        if torch.compiler.is_compiling():
            if device in self._sums:
                self._sums[device].dense[_REASON_INDEX[reason]].add_(1)
            return
        with self._lock:
            self._dense[reason] += 1

    def add_round(self, drafted: int, checks: int = 1) -> None:
        """Count the check of so many drafted tokens, of one row or several."""
        with self._lock:
            self._rounds[0] += checks
            self._rounds[1] += drafted

    def add_accepted(self, tokens: int = 1) -> None:
        """Count drafted tokens that were used."""
        with self._lock:
            self._rounds[2] += tokens

    def _fold(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        groups: dict[tuple[int, torch.device], list[tuple[Tensor, Tensor, Tensor, Tensor, bool]]]
        groups = {}
        for item in pending:
            groups.setdefault((len(item[0]), item[0].device), []).append(item)
        for (_, device), items in groups.items():
            self.prepare(device)
            counts, mass, mass_mean, inverse = (
                torch.cat(part) for part in list(zip(*items, strict=True))[:4]
            )
            with self._lock:
                self._sums[device].add(counts, mass, mass_mean, inverse, [i[4] for i in items])

    def stats(self) -> Stats:
        """Sum up; reads the device."""
        self._fold()
        parts = list(self._sums.values())
        dense = self._dense_steps(parts)
        others: dict[str, Any] = dict(
            zip(("checks", "drafted", "accepted"), self._rounds, strict=True)
        )
        others["clamped"] = self.clamped.total()
        if not parts:
            return Stats(0, 0, dense=dense, **others)
        steps, rows = (int(n) for n in torch.stack([s.tally.cpu() for s in parts]).sum(0))
        if not rows:
            return Stats(steps, 0, dense=dense, **others)
        mean = torch.stack([s.total.cpu() for s in parts]).sum(0) / rows
        low = torch.stack([s.low.cpu() for s in parts]).amin(0)
        high = torch.stack([s.high.cpu() for s in parts]).amax(0)
        summaries: dict[str, Any] = {
            name: Summary(float(mean[i]), float(low[i]), float(high[i]))
            for i, name in enumerate(QUANTITIES)
        }
        return Stats(steps, rows, **summaries, dense=dense, **others)

    def _dense_steps(self, parts: list[_Sums]) -> dict[str, int]:
        with self._lock:
            counts = Counter(self._dense)
        for sums in parts:
            for reason, count in zip(DenseReason, sums.dense.tolist(), strict=True):
                counts[reason] += int(count)
        return {reason.value: counts[reason] for reason in DenseReason if counts[reason]}

    def reset(self) -> None:
        """Start counting anew."""
        with self._lock:
            self._pending, self.entries, self._dense = [], [], Counter()
            self._rounds = [0, 0, 0]
            self.clamped.reset()
            for sums in self._sums.values():
                sums.reset()
