"""What a cache of 8 bits changes for a setting, along the dense answers."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..config import PulseConfig
from ..trace.record import Trace
from .trials import BEARS, ForcedAnswers, Trial

Kept = dict[tuple[int, int, int, int], frozenset[int]]  # by input, row, step and layer


@dataclass(frozen=True)
class Float8Trial:
    """The suggestion with `cache="fp8"`."""

    trial: Trial  # against the dense answers
    steps: float  # share of steps that write the token of the same setting without 8 bits
    answers: float  # share of answers in which every step does
    kept: float  # mean share of a step's kept tokens that the same step keeps without 8 bits
    same: float  # share of steps that keep the very same ones
    clamped: int  # numbers of keys and values that their scales did not hold

    def breaks(self, chosen: Trial) -> bool:
        """Whether the model writes something else with it than with the chosen setting."""
        low, _ = chosen.interval
        return self.trial.agreement < BEARS and self.trial.interval[1] < low

    def says(self, chosen: Trial) -> str:
        """The last sentences of a report."""
        verdict = 'The model bears it: cache="fp8" is in the setting.'
        if self.breaks(chosen):
            verdict = "It breaks this model: the setting leaves it out."
        return (
            f"With a cache of 8 bits {100 * self.kept:.1f} % of a step's kept tokens stay, "
            f"{100 * self.steps:.2f} % of steps\nand {100 * self.answers:.1f} % of answers say "
            f"the same, and {self.clamped} numbers were clamped. {verdict}"
        )


def float8_trial(forced: ForcedAnswers, config: PulseConfig) -> Float8Trial:
    """Run a setting with both caches along the dense answers."""
    (_, said, session), (trial, small, other) = (
        forced.follow("with a cache of 8 bits", config.updated(cache=cache), record=True)
        for cache in ("model", "fp8")
    )
    agrees = list(_agreement(said, small))
    shares = _shares(_kept(session.trace, said), _kept(other.trace, said))
    clamped = other.stats.clamped
    return Float8Trial(
        trial,
        steps=_mean([same for answer in agrees for same in answer]),
        answers=_mean([all(answer) for answer in agrees]),
        kept=_mean(shares),
        same=_mean([share == 1 for share in shares]),
        clamped=clamped,
    )


def _agreement(said: list[Tensor], other: list[Tensor]) -> Iterator[list[bool]]:
    """Of each answer, whether both say the same in each place."""
    for a, b in zip(said, other, strict=True):
        for row, live in zip((a == b).tolist(), (a >= 0).tolist(), strict=True):
            yield [same for same, is_live in zip(row, live, strict=True) if is_live]


def _kept(trace: Trace, said: list[Tensor]) -> Kept:
    """The kept tokens of the steps of answers, not of those behind an answer's end."""
    lengths = [(tokens >= 0).sum(1).tolist() for tokens in said]
    inputs = {c: i for i, c in enumerate(sorted({row.conversation for row in trace}))}
    return {
        (inputs[row.conversation], row.row, row.step, row.layer): frozenset(row.kept.tolist())
        for row in trace
        if row.step < lengths[inputs[row.conversation]][row.row]
    }


def _shares(kept: Kept, other: Kept) -> list[float]:
    return [len(tokens & other[at]) / len(tokens) for at, tokens in kept.items() if tokens]


def _mean(values: list[float] | list[bool]) -> float:
    return sum(values) / len(values) if values else 1.0
