"""The ratios that the CPU engine must hold, of what bench_layers times."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from harness import ONE_THREAD
from shapes import GOAL_SHAPES

from visionpulse.bench.rows import dtype_name
from visionpulse.bench.timing import Times

READ, GATHER = "stream-read", "gather-read"
WIDE = ":wide"  # ours over a cache in the dtype of q, beside one of 8 bits


@dataclass(frozen=True)
class Goal:
    """A ratio of bests that the CPU engine must hold, and the one to aim at, on one dtype."""

    name: str
    over: str  # stage/variant: its time over that of `under`
    under: str
    must: float
    aim: float
    shapes: tuple[str, ...] = tuple(GOAL_SHAPES)
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    than: tuple[str, str] | None = None  # the ratio over that of these two
    threads: int = 1

    def ratio(self, times: Mapping[str, Times]) -> float | None:
        """None where something was not timed."""
        pairs = [(self.over, self.under), *([self.than] if self.than else [])]
        if not all(name in times for pair in pairs for name in pair):
            return None
        ratio, *than = (times[over].best / times[under].best for over, under in pairs)
        return ratio / than[0] if than else ratio

    @property
    def at_least(self) -> bool:
        return self.aim > self.must

    def holds(self, ratio: float, margin: float) -> bool:
        if self.at_least:
            return ratio >= self.must * (1 - margin)
        return ratio <= self.must * (1 + margin)


_BF16 = ("bf16",)
_32K, _FP8 = ("b1-32k-t512",), ("b1-32k-t512-fp8",)
_DENSE, _ANCHOR, _VLLM = "dense/cpu", "anchor/cpu:dense-output", "dense/vllm-cpu"
_READ, FOLLOWER_GATHER = f"dense/{READ}", f"follower/{GATHER}"
PAGES = (16, 64, 128)  # tokens


def _scales(what: str, probe: str, name: str) -> Goal:
    """How much faster two threads are than one, beside the same of the reads it waits for."""
    pair, than = (f"{what}{ONE_THREAD}", what), (f"{probe}{ONE_THREAD}", probe)
    return Goal(f"two threads over one, {name}", *pair, 0.9, 1.0, _32K, than=than, threads=2)


GOALS = (
    _scales(_DENSE, _READ, "dense as a stream read"),
    _scales("follower/cpu", FOLLOWER_GATHER, "follower as a gather"),
    *(
        Goal(f"pages of {n} over contiguous", f"{_DENSE}:pages-{n}", _DENSE, 1.05, 1.0, _32K + _FP8)
        for n in PAGES
    ),
    Goal("bytes/s of dense over a stream read", _READ, _DENSE, 0.85, 0.93, dtypes=("bf16", "fp16")),
    Goal("bytes/s of dense over a stream read", _READ, _DENSE, 0.90, 0.93, dtypes=("fp32",)),
    Goal("vLLM's kernel over dense", _VLLM, _DENSE, 1.1, 1.3, _32K, ("bf16",)),
    Goal("vLLM's kernel over dense", _VLLM, _DENSE, 1.4, 1.6, _32K, ("fp32",)),
    Goal("dense anchor over dense", _ANCHOR, _DENSE, 1.08, 1.04),
    Goal("pruned anchor over dense", "anchor/cpu", _DENSE, 0.64, 0.57, _32K),
    Goal("bytes/s of follower over a gather", FOLLOWER_GATHER, "follower/cpu", 0.70, 0.85),
    Goal("dense, 16 bits over 8", f"{_DENSE}{WIDE}", _DENSE, 1.5, 1.8, _FP8, _BF16),
    Goal(
        "pruned anchor, 16 bits over 8",
        f"anchor/cpu{WIDE}",
        "anchor/cpu",
        1.4,
        1.7,
        _FP8,
        ("bf16",),
    ),
    Goal(
        "follower, 16 bits over 8", f"follower/cpu{WIDE}", "follower/cpu", 1.3, 1.6, _FP8, ("bf16",)
    ),
    Goal("torch.topk over select", "select/torch-topk", "select/cpu", 5, 8, _32K, ("bf16",)),
)

# what runs on one thread too, where there are more
SCALE = ("ceiling:gather", _READ, _DENSE, "follower/cpu")


def judged(
    times: Mapping[str, Times], shape: str, dtype: torch.dtype, margin: float, threads: int = 1
) -> Iterator[tuple[bool, str]]:
    """Whether each goal of this shape and dtype holds, and the line that says so."""
    for goal in GOALS:
        if shape not in goal.shapes or dtype_name(dtype) not in goal.dtypes:
            continue
        ratio = goal.ratio(times)
        if ratio is None or goal.threads != threads:
            continue
        holds, sign = goal.holds(ratio, margin), ">=" if goal.at_least else "<="
        line = f"{goal.name}: {ratio:.3g}, must {sign} {goal.must:g}, aim {goal.aim:g}"
        yield holds, f"{'holds' if holds else 'SHORT'}  {shape} {dtype_name(dtype)}  {line}"
