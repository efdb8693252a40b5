"""Timing for noisy machines: variants interleaved in one run, caches cold, ratios of bests.

Two numbers taken minutes apart on a shared machine cannot be compared. Here every round runs every
variant once, in a new random order, and each call gets the number of its turn, to rotate buffers.
On a CPU a call's tensors are evicted, and just before it the same call runs on the next turn's,
untimed: so the data are cold in caches of any size, and the code is what a layer of a decode step
finds behind another one. What a step calls once, an anchor, finds its scratch memory cold too.
Where torch has one thread the clock is that thread's CPU time, so that a neighbour who takes the
core for a while is not counted; with more threads it is the wall clock.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..workspace import Workspace
from .cold import evict

Variant = Callable[[int], object]
FLUSH_BYTES = 256 << 20  # more than any L2 of today's GPUs


@dataclass(frozen=True)
class OncePerStep:
    """A layer that a step has one of: its scratch was last used before all of the others."""

    layer: Variant
    workspace: Workspace

    def __call__(self, turn: int) -> object:
        """Run the layer of this turn."""
        return self.layer(turn)

    @property
    def scratch(self) -> list[Tensor]:
        """The buffers that it has by now."""
        return list(self.workspace._buffers.values())


@dataclass(frozen=True)
class Times:
    """Seconds of the rounds of one variant, ascending."""

    seconds: tuple[float, ...]
    launch: float = 0.0  # what a launch by itself takes beside them; 0: it is among them

    @property
    def best(self) -> float:
        """The shortest."""
        return self.seconds[0]

    def quantile(self, share: float) -> float:
        """The smallest time that `share` of the rounds did not pass."""
        place = max(0, -(-int(share * 100) * len(self.seconds) // 100) - 1)
        return self.seconds[min(place, len(self.seconds) - 1)]

    @property
    def p20(self) -> float:
        """A fifth of the rounds took this or less."""
        return self.quantile(0.2)

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)

    @property
    def p80(self) -> float:
        """Four fifths of the rounds took this or less."""
        return self.quantile(0.8)


def interleaved(
    variants: Mapping[str, Variant],
    rounds: int,
    *,
    warmup: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_round: Callable[[int], object] | None = None,
    cold: Callable[[str, int], Iterable[Tensor]] | None = None,
) -> dict[str, Times]:
    """Time every variant once a round, in random order; `variant(turn)` may rotate its buffers.

    On a GPU the L2 cache is emptied before each call and the time is the device's own. On a CPU
    `cold(name, turn)` names the tensors that a turn reads and must not find in a cache.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    clock = _device_seconds if torch.device(device).type == "cuda" else _host_seconds
    order, shuffle = list(variants), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    turn = 0
    for played in range(warmup + rounds):
        shuffle.shuffle(order)
        for name in order:
            if cold is not None:
                _run_behind(variants[name], turn, partial(cold, name))
            taken = clock(variants[name], turn)
            turn += 1
            if played >= warmup:
                seconds[name].append(taken)
        if on_round is not None:
            on_round(played)
    return {name: Times(tuple(sorted(taken))) for name, taken in seconds.items()}


def _run_behind(variant: Variant, turn: int, reads: Callable[[int], Iterable[Tensor]]) -> None:
    """Run the next turn, and leave this one's tensors cold, those too that both read."""
    mine = list(reads(turn))
    others = {tensor.untyped_storage().data_ptr() for tensor in reads(turn + 1)}
    shared = [tensor for tensor in mine if tensor.untyped_storage().data_ptr() in others]
    evict(tensor for tensor in mine if tensor.untyped_storage().data_ptr() not in others)
    variant(turn + 1)
    evict([*shared, *(variant.scratch if isinstance(variant, OncePerStep) else [])])


def per_layer(one: Times, many: Times, layers: int) -> Times:
    """The time of a layer behind another, from a graph of one and a graph of several.

    What a graph costs by itself, its launch and the events around it, is in both alike, so the
    difference is that of the layers alone. The rest is `launch`.
    """
    if layers < 2:
        raise ValueError(f"per_layer needs a graph of at least 2 layers, got {layers}")
    if many.best <= one.best:
        raise ValueError(
            f"a graph of {layers} layers took {many.best:g} s, one of 1 layer {one.best:g} s; "
            "is the device shared?"
        )
    seconds = tuple((taken - one.best) / (layers - 1) for taken in many.seconds)
    return Times(seconds, max(0.0, one.best - seconds[0]))


def _host_seconds(variant: Variant, turn: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    variant(turn)
    return clock() - begin


@cache
def _flush(size: int) -> Tensor:
    return torch.zeros(size // 4, device="cuda")


def empty_l2() -> None:
    """Empty the L2 cache of the GPU by reading: what was written would have to be written back.

    Half of an L2 of dirty lines costs the call behind them some 10 us.
    """
    _flush(FLUSH_BYTES).sum()


def _device_seconds(variant: Variant, turn: int) -> float:
    empty_l2()
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    variant(turn)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
