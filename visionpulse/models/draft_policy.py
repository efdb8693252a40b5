"""How many tokens a round drafts, and by which schedule. It never changes what is said.

A round of g drafted tokens costs g draft steps and one check, and gives 1 + a + ... + a^g tokens
where each is accepted with chance a. The policy knows the costs from the rounds before, estimates
the acceptance of each way to draft by a moving average, and takes what gives most tokens a second.
Where nothing beats plain dense steps it takes these, and tries again later.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MOST = 15  # drafted tokens of a round; a check takes them and one more
FIRST = 4  # drafted tokens of a round that tries a way
TRIES = 2  # rounds of each way at the beginning
FORGET = 0.97  # weight of what is known when a round adds to it
PLAIN, LONGEST_PLAIN = 32, 512  # plain steps before drafting is tried again; doubled each time


class Plan(NamedTuple):
    """What a round does."""

    way: int  # its number
    tokens: int  # drafted; 0 is a plain dense step


@dataclass
class _Mean:
    """A moving average; the first values count alike."""

    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, keep: float = 0.9) -> None:
        self.weight = keep * self.weight + 1
        self.value += (value - self.value) / self.weight


@dataclass
class _Way:
    """What is known of one way to draft."""

    good: float = 9.0  # before the first round: nine of ten are accepted
    bad: float = 1.0
    step: _Mean = field(default_factory=_Mean)  # seconds of a draft step
    tries: int = 0

    @property
    def acceptance(self) -> float:
        """Of drafted tokens, each behind an accepted one."""
        return self.good / (self.good + self.bad)

    def add(self, rows: Sequence[tuple[int, int]]) -> None:
        accepted = sum(took for _, took in rows) / len(rows)
        rejected = sum(took < drafted for drafted, took in rows) / len(rows)
        self.good, self.bad = FORGET * self.good + accepted, FORGET * self.bad + rejected
        self.tries += 1


class DraftPolicy:
    """Chooses for one session."""

    def __init__(self, ways: int) -> None:
        self._ways = [_Way() for _ in range(ways)]
        self._checks: dict[int, _Mean] = {}  # seconds, by tokens that are checked
        self._plain_left = 0
        self._plain_next = PLAIN
        self._is_due = False  # drafting is tried again after the plain steps that are left

    def plan(self) -> Plan:
        """What the next round does; reads nothing but what was learned."""
        untried = min(self._ways, key=lambda way: way.tries)
        if untried.tries < TRIES:
            return Plan(self._ways.index(untried), FIRST)
        if 1 not in self._checks or self._plain_left > 0:
            self._plain_left -= 1
            return Plan(0, 0)
        best, speed = self._best()
        if speed > 1 / self._checks[1].value:
            self._plain_next, self._is_due = PLAIN, False
            return best
        if self._is_due:  # a stretch of plain steps is over: has anything changed?
            self._is_due = False
            return best._replace(tokens=min(best.tokens, FIRST))
        self._is_due, self._plain_left = True, self._plain_next - 1
        self._plain_next = min(2 * self._plain_next, LONGEST_PLAIN)
        return Plan(0, 0)

    def _best(self) -> tuple[Plan, float]:
        """What gives most tokens a second, and how many."""
        checks = [self.check_seconds(tokens + 1) for tokens in range(MOST + 1)]
        best, most = Plan(0, 1), 0.0
        for number, way in enumerate(self._ways):
            acceptance, step = way.acceptance, way.step.value
            power = said = 1.0
            for tokens in range(1, MOST + 1):
                power *= acceptance
                said += power
                speed = said / (tokens * step + checks[tokens])
                if speed > most:
                    best, most = Plan(number, tokens), speed
        return best, most

    def check_seconds(self, tokens: int) -> float:
        """Seconds of a check: measured, or on the line between the nearest that were."""
        known = sorted(self._checks)
        below = max((n for n in known if n <= tokens), default=None)
        above = min((n for n in known if n >= tokens), default=None)
        if below is None or above is None:
            return self._checks[known[-1] if above is None else known[0]].value
        low, high = self._checks[below].value, self._checks[above].value
        share = 0.0 if above == below else (tokens - below) / (above - below)
        return low + share * (high - low)

    def learn(self, plan: Plan, rows: Sequence[tuple[int, int]]) -> None:
        """Hear of each row how many tokens were drafted and accepted, as far as anybody asked."""
        if rows and plan.tokens:
            self._ways[plan.way].add(rows)

    def time(self, plan: Plan, draft_seconds: float, check_seconds: float) -> None:
        """Hear what a round cost."""
        if plan.tokens:
            self._ways[plan.way].step.add(draft_seconds / plan.tokens)
        self._checks.setdefault(plan.tokens + 1, _Mean()).add(check_seconds)

    def about(self) -> list[dict[str, Any]]:
        """What is known of each way, for people."""
        return [
            {"acceptance": way.acceptance, "rounds": way.tries, "step_seconds": way.step.value}
            for way in self._ways
        ]


class FixedDraft:
    """Always as many tokens."""

    def __init__(self, tokens: int) -> None:
        self._plan = Plan(0, tokens)
        self.seconds: deque[tuple[float, float]] = deque(maxlen=64)  # of the last drafts and checks

    def plan(self) -> Plan:
        """What the next round does."""
        return self._plan

    def learn(self, plan: Plan, rows: Sequence[tuple[int, int]]) -> None:
        """Nothing to learn."""

    def time(self, plan: Plan, draft_seconds: float, check_seconds: float) -> None:
        """Keep what a round cost."""
        self.seconds.append((draft_seconds, check_seconds))


def ways_of(config: Any, anchors: Sequence[int], able: Sequence[int]) -> list[Any]:
    """The settings that an automatic policy tries: what a schedule is worth is a fact of the model.

    A schedule other than the published one was asked for and stays; `able` are the layers that some
    layer follows.
    """
    if config.schedule != "paper" or len(anchors) != 1:
        return [config]
    anchor = anchors[0]
    looking = config.updated(schedule="lookback", refresh=0, queries="dense", anchor=anchor)
    ways = [looking]
    ways += [looking.updated(anchor=layer) for layer in able if layer < anchor][-1:]
    later = [layer for layer in able if layer > anchor]
    if later:
        ways.append(config.updated(anchor=(anchor, later[len(later) // 2])))
    return [*ways, config]
