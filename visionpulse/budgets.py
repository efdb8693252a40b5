"""Budgets: how many visual tokens a step keeps, as policies with one registry.

A policy offers `bound(n_visual) -> int`, the host bound that sizes every buffer, and
`counts(mass, n_visual, scores) -> int32 [B]`, computed on the device. `mass` is [B], `n_visual`
int32 [B] (the visible visual tokens), `scores` float [B, N] with -inf where there is no candidate.
A policy that is only a clamp of the mass, or of numbers drawn before the step, says so through
`clamp` and `draw`: then the backend computes K inside its select stage. One that needs neither
mass nor scores gives `wanted`. One that follows the clamp of the config takes it by `within`.
Any other runs between score and select.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Budget: TypeAlias = Any  # one of the policies below, or any object with `bound` and `counts`


def clamp_count(ratio: Tensor, n_visual: Tensor, low: float, high: float) -> Tensor:
    """Turn a ratio per row into a count, exactly as every backend does.

    Defined by

        r = clamp(ratio, low, high)                      # NaN gives high: fail open
        K = floor(float32(r) * float32(n_visual))        # at least 1, at most n_visual
    """
    r = ratio.nan_to_num(nan=high).clamp(low, high).float()
    count = (r * n_visual.float()).floor().to(torch.int32)
    return count.clamp(min=1).minimum(n_visual)


def bound_count(ratio: float, n_visual: int) -> int:
    """The same expression on the host: the largest K that `ratio` allows, at least 1."""
    count = int(np.floor(np.float32(ratio) * np.float32(n_visual)))
    return max(1, min(count, n_visual))


class Policy:
    """Base of the policies here; a user's own class needs only `bound` and `counts`."""

    needs_score: tuple[str, ...] | None = None

    def within(self, low: float, high: float) -> "Policy":
        """The same policy under the clamp of a config; only some depend on it."""
        return self

    def clamp(self) -> tuple[float, float] | None:
        """Bounds of the retention ratio if that is all the policy is, else None."""
        return None

    def draw(self, rows: int, device: torch.device) -> Tensor | None:
        """A ratio per row, float32 [B], that stands in for the mass, or None."""
        return None

    def wanted(self, rows: int, device: torch.device) -> Tensor | None:
        """A count per row, int32 [B], that needs neither mass nor scores, or None."""
        return None


@dataclass(frozen=True)
class Dynamic(Policy):
    """The paper's budget: the visual attention mass, clamped to the config's ratio."""

    low: float = 0.0
    high: float = 1.0

    def within(self, low: float, high: float) -> "Dynamic":
        return Dynamic(low, high)

    def clamp(self) -> tuple[float, float]:
        return self.low, self.high

    def bound(self, n_visual: int) -> int:
        return bound_count(self.high, n_visual)

    def counts(self, mass: Tensor, n_visual: Tensor, scores: Tensor) -> Tensor:
        return clamp_count(mass, n_visual, self.low, self.high)


@dataclass(frozen=True)
class Fixed(Policy):
    """The same share of the visual tokens at every step."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"Fixed takes a ratio in 0..1, got {self.ratio!r}")

    def clamp(self) -> tuple[float, float]:
        return self.ratio, self.ratio

    def bound(self, n_visual: int) -> int:
        return bound_count(self.ratio, n_visual)

    def counts(self, mass: Tensor, n_visual: Tensor, scores: Tensor) -> Tensor:
        return clamp_count(mass, n_visual, self.ratio, self.ratio)


@dataclass(frozen=True)
class Random(Policy):
    """A ratio drawn from U(r_min, r_max) per step and row; the ranking is unchanged.

    One generator per device, seeded once, so a run repeats and a second run goes on drawing.
    """

    seed: int
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)
    _generators: dict[torch.device, torch.Generator] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def within(self, low: float, high: float) -> "Random":
        bound = replace(self)
        for name, value in (("low", low), ("high", high), ("_generators", self._generators)):
            object.__setattr__(bound, name, value)  # shared: every step draws from one stream
        return bound

    def clamp(self) -> tuple[float, float]:
        return self.low, self.high

    def draw(self, rows: int, device: torch.device) -> Tensor:
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(self.seed)
            self._generators[device] = generator
        u = torch.rand(rows, generator=generator, device=device)
        return self.low + (self.high - self.low) * u

    def bound(self, n_visual: int) -> int:
        return bound_count(self.high, n_visual)

    def counts(self, mass: Tensor, n_visual: Tensor, scores: Tensor) -> Tensor:
        drawn = self.draw(len(n_visual), n_visual.device)
        return clamp_count(drawn, n_visual, self.low, self.high)


@dataclass(frozen=True)
class TopK(Policy):
    """Always `k` tokens, or all there are."""

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopK takes a count >= 1, got {self.k!r}")

    def wanted(self, rows: int, device: torch.device) -> Tensor:
        return torch.full((rows,), self.k, dtype=torch.int32, device=device)

    def bound(self, n_visual: int) -> int:
        return max(1, min(self.k, n_visual))

    def counts(self, mass: Tensor, n_visual: Tensor, scores: Tensor) -> Tensor:
        return n_visual.clamp(max=self.k)


@dataclass(frozen=True)
class TopP(Policy):
    """The fewest tokens whose scores, summed from the largest, reach `p`; else all."""

    p: float
    needs_score = ("prob", "prob_tau")

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"TopP takes 0 < p <= 1, got {self.p!r}")

    def bound(self, n_visual: int) -> int:
        return max(1, n_visual)

    def counts(self, mass: Tensor, n_visual: Tensor, scores: Tensor) -> Tensor:
        s = scores.double().masked_fill(~scores.isfinite(), 0.0)  # [B, N]
        reached = s.sort(dim=1, descending=True).values.cumsum(dim=1) < self.p
        return (reached.sum(dim=1, dtype=torch.int32) + 1).minimum(n_visual)


REGISTRY: dict[str, Callable[[], Budget]] = {"dynamic": Dynamic}


def register(name: str, make: Callable[[], Budget]) -> None:
    """Let `PulseConfig(budget=name)` use the policy that `make()` gives."""
    if name in REGISTRY:
        raise ValueError(f"budget {name!r} is taken; known: {', '.join(REGISTRY)}")
    REGISTRY[name] = make


# name in text and in JSON, as in "top_k:64": the policy, and what reads its number
NAMED: dict[str, tuple[Callable[[Any], Policy], Callable[[str], float]]] = {
    "fixed": (Fixed, float),
    "random": (Random, int),
    "top_k": (TopK, int),
    "top_p": (TopP, float),
}


def named(budget: Budget) -> Budget:
    """The policy that a text such as "top_k:64" names; anything else passes through."""
    name, colon, number = budget.partition(":") if isinstance(budget, str) else ("", "", "")
    if not colon:
        return budget
    if name not in NAMED:
        raise ValueError(f"no budget {budget!r}; with a number there are {', '.join(NAMED)}")
    make, read = NAMED[name]
    try:
        value = read(number)
    except ValueError as error:
        example = "64" if read is int else "0.05"
        raise ValueError(f"cannot read budget {budget!r}; write {name}:{example}") from error
    return make(value)


def name_of(budget: Budget) -> str:
    """The text that `named` takes back; a policy of a user is shown as Python does."""
    for name, (kind, _) in NAMED.items():
        if isinstance(budget, Policy) and type(budget) is kind:
            first = fields(budget)[0].name  # type: ignore[arg-type]
            return f"{name}:{getattr(budget, first)}"
    return budget if isinstance(budget, str) else repr(budget)


def policy_of(budget: Budget, ratio: tuple[float, float]) -> Budget:
    """The policy behind a config's `budget`, under the config's clamp."""
    policy = REGISTRY[budget]() if isinstance(budget, str) else budget
    return policy.within(*ratio) if isinstance(policy, Policy) else policy
