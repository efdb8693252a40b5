"""When lossless decoding pays: what a round of drafted tokens costs beside dense steps.

A round drafts g tokens by sparse steps and checks them by one dense forward of g + 1. With weights
W, dense attention A, sparse attention s and the attention of a check C(g + 1), a token costs
(g (W + s) + W(g + 1) + C(g + 1)) / E, and E = 1 + a + ... + a^g where each drafted token is
accepted with chance a.
"""

from collections.abc import Callable
from typing import NamedTuple

MOST = 15  # drafted tokens of a round
ACCEPTANCES = (0.8, 0.9, 0.95, 0.99)


class RoundCost(NamedTuple):
    """Seconds, of all layers."""

    weights: Callable[[int], float]  # of a forward of so many tokens a row
    dense: float  # attention of a dense step
    draft: float  # attention of a sparse step
    check: Callable[[int], float]  # attention of a dense forward of so many tokens a row

    @property
    def attention_share(self) -> float:
        """A / W: dense attention over weights."""
        return self.dense / self.weights(1)

    def speed(self, acceptance: float, drafted: int) -> float:
        """How many times as fast as dense steps."""
        tokens = sum(acceptance**i for i in range(drafted + 1))
        seconds = drafted * (self.weights(1) + self.draft)
        seconds += self.weights(drafted + 1) + self.check(drafted + 1)
        return tokens * (self.weights(1) + self.dense) / seconds

    def best(self, acceptance: float) -> tuple[float, int]:
        """The highest speed, and the tokens that a round drafts for it."""
        return max((self.speed(acceptance, n), n) for n in range(1, MOST + 1))


def line(few: float, many: float, queries: int) -> Callable[[int], float]:
    """Seconds by the queries of a row, from those of one and of `queries`."""
    return lambda asked: few + max(0.0, many - few) * (asked - 1) / (queries - 1)
