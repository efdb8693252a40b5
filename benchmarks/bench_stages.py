"""Each stage of a decode step on one layer, with the ratios that the CPU engine must hold.

    python benchmarks/bench_stages.py --out benchmarks/results/cpu-stages.jsonl
    python benchmarks/bench_stages.py --shapes 32k --gate      # exit 1 where a ratio falls short

Every round runs every variant once in random order, on buffers rotated past the last cache; ratios
are of bests. With one thread the clock is the thread's own CPU time, so that a neighbour who takes
the core for a while is not counted; with more it is the wall clock.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import baselines
import torch
from harness import Variant
from shapes import Layers, Shape

import visionpulse as vp
from visionpulse._native import module
from visionpulse.bench import rows as rows_
from visionpulse.bench.rows import DTYPES, Ceiling, Machine, Row
from visionpulse.bench.timing import Times
from visionpulse.testing.compare import Exact, assert_masses, assert_output, assert_valid_selection

READ, GROUPED, TOPK = "stream-read", "torch-sdpa-grouped", "torch-topk"
TEXT = 512
SHAPES = {f"{k}k": Shape(f"b1-{k}k", 1, k * 1024 - TEXT, TEXT) for k in (8, 16, 32, 128)}
CHECKED_KEYS = 4096  # float64 over all keys of the long shapes would take minutes
SCORE_BYTES = 64 << 20  # of scores that select and topk rotate through
SLOW_ROUNDS = 2  # of what models call today: 0.1 to 1 s a call


@dataclass(frozen=True)
class Goal:
    """A ratio of bests that must hold, and the one to aim at; `at_least` or at most."""

    name: str
    above: str
    below: str
    must: float
    aim: float
    at_least: bool
    shapes: tuple[str, ...] = ("8k", "32k", "128k")
    dtypes: tuple[str, ...] = ("bf16", "fp32")

    def ratio(self, times: dict[str, Times]) -> float:
        return times[self.above].best / times[self.below].best

    def holds(self, ratio: float, margin: float) -> bool:
        return (
            ratio >= self.must * (1 - margin)
            if self.at_least
            else ratio <= self.must * (1 + margin)
        )


ANCHOR, FOLLOWER = "cpu-anchor-dense", "cpu-follower"
GOALS = (
    Goal("dense / stream read (bytes per second)", READ, "cpu-dense", 0.65, 0.80, True),
    Goal("dense anchor / dense", "cpu-anchor-dense", "cpu-dense", 1.25, 1.10, False),
    Goal("pruned anchor / dense", "cpu-anchor-pruned", "cpu-dense", 0.72, 0.60, False, ("32k",)),
    Goal("dense anchor over SDPA", GROUPED, ANCHOR, 3.6, 6, True, ("32k",), ("bf16",)),
    Goal("dense anchor over SDPA", GROUPED, ANCHOR, 2.0, 3, True, ("32k",), ("fp32",)),
    Goal("follower over SDPA", GROUPED, FOLLOWER, 27, 45, True, ("32k",), ("bf16",)),
    Goal("follower over SDPA", GROUPED, FOLLOWER, 16, 25, True, ("32k",), ("fp32",)),
    Goal("follower over dense", "cpu-dense", "cpu-follower", 6.7, 10, True, ("128k",)),
    Goal("select over torch.topk", TOPK, "cpu-select", 5, 8, True, ("32k",), ("bf16",)),
)  # fmt: skip


def ours(layers: Layers) -> dict[str, Variant]:
    """The stages of the CPU backend, each on the layer of its turn."""
    dense, pruned = (layers.shape.config(anchor_output=kind) for kind in ("dense", "pruned"))
    visual, work = layers.visual, vp.Workspace()
    q, kv = layers.at(0)
    first, mass, _ = vp.score(q, kv, visual, pruned, backend="cpu")[:3]
    kept = vp.select(first, mass, visual, pruned, backend="cpu")
    scores = [first.clone() for _ in range(-(-SCORE_BYTES // (4 * first.numel())))]
    more = {"workspace": work, "backend": "cpu", "out": torch.empty_like(q)}
    return {
        "cpu-dense": lambda t: vp.attend(*layers.at(t), **more),
        "cpu-anchor-dense": lambda t: vp.decode(*layers.at(t), visual, dense, **more),
        "cpu-anchor-pruned": lambda t: vp.decode(*layers.at(t), visual, pruned, **more),
        "cpu-follower": lambda t: vp.attend(*layers.at(t), visual, kept, **more),
        "cpu-select": lambda t: vp.select(
            scores[t % len(scores)], mass, visual, pruned, workspace=work, backend="cpu"
        ),
        TOPK: _topk(layers, scores, int(kept.counts[0])),
    }


def _topk(layers: Layers, scores: list[torch.Tensor], count: int) -> Variant:
    begin, end = layers.visual.spans[0, 0].tolist()
    return lambda t: scores[t % len(scores)][0, begin:end].topk(count)


def stream_read(layers: Layers) -> Variant:
    """The ceiling: K and V of the turn's layer read once by the widest loads there are."""
    read = module().cpu.read_bytes

    def run(turn: int) -> None:
        kv = layers.at(turn)[1]
        for tensor in (kv.k, kv.v):
            read(tensor.data_ptr(), tensor.numel() * tensor.itemsize)

    return run


def check(layers: Layers) -> None:
    """Hold every stage against float64 on the first keys of the very buffers that are timed."""
    q, kv = layers.at(0)
    size = min(CHECKED_KEYS, kv.capacity)
    begin, end = layers.visual.spans[0, 0].tolist()
    visual = vp.VisualTokens.from_spans([[(begin, min(end, size - TEXT // 4))]])
    part = vp.KVCache(kv.k[:, :, :size], kv.v[:, :, :size])
    exact = Exact(q, part, visual, vp.ops.numbers(q, None, None, None)._replace(tau=0.4))
    assert_output(vp.attend(q, part, backend="cpu"), exact, None)
    for kind in ("dense", "pruned"):
        config, scores = layers.shape.config(anchor_output=kind), torch.empty(1, size)
        out, kept = vp.decode(q, part, visual, config, scores=scores, backend="cpu")
        assert_valid_selection(kept, scores, exact.candidate)
        assert_masses(kept.mass, kept.mass_mean, exact)
        assert_output(out, exact, kept if kind == "pruned" else None)
        assert_output(vp.attend(q, part, visual, kept, backend="cpu"), exact, kept)


def play(variants: dict[str, Variant], rounds: int, clock: Callable[[], float]) -> dict[str, Times]:
    """Interleave the variants; one round to warm up."""
    order, shuffle, turn = list(variants), random.Random(0), 0
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for played in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            begin = clock()
            variants[name](turn)
            taken, turn = clock() - begin, turn + 1
            if played:
                seconds[name].append(taken)
    return {name: Times(tuple(sorted(taken))) for name, taken in seconds.items()}


def moved(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """The least bytes that each variant must move."""
    whole = shape.cache_bytes(dtype)
    row = whole // shape.keys
    kept = (shape.text + shape.kept) * row
    return {
        READ: whole, GROUPED: whole, "transformers-sdpa": whole, "transformers-eager": whole,
        "onnxruntime": whole, "cpu-dense": whole, "cpu-anchor-dense": whole,
        "cpu-anchor-pruned": whole // 2 + kept // 2, "cpu-follower": kept,
        "cpu-select": 4 * shape.visual, TOPK: 4 * shape.visual, "cpu-dense-2-threads": whole,
    }  # fmt: skip


def baselines_of(layers: Layers, names: str, dtype: torch.dtype) -> dict[str, Variant]:
    """The forms of baselines.py that can run here."""
    found = {}
    for form in baselines.usable(names, torch.device("cpu"), dtype, lambda text: None):
        if form.dense is not None:
            baselines.check(form.name, "cpu")
            found[form.name] = lambda t, run=form.dense: run(*layers.at(t))
    return found


def measure(
    shape: Shape, dtype: torch.dtype, options: argparse.Namespace
) -> tuple[dict, list[Row]]:
    """One shape and dtype: the times by variant, and the rows."""
    layers = Layers.make(shape, dtype, layers=8, budget=options.budget << 20)
    check(layers)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    slow = baselines_of(layers, options.baselines, dtype)
    quick = {READ: stream_read(layers), **ours(layers)}
    if GROUPED in slow:
        quick[GROUPED] = slow.pop(GROUPED)
    short = {name: quick.pop(name) for name in ("cpu-select", TOPK)}
    times = play(quick, options.rounds, clock) | play(short, 10 * options.rounds, clock)
    times |= play(slow, SLOW_ROUNDS, clock)
    if options.two_threads:
        times |= two_threads(quick["cpu-dense"], options)
    read = Ceiling("read of the same K and V", shape.cache_bytes(dtype) / times[READ].best / 1e9)
    made = rows_.rows_of(
        "stages", shape.name, dtype, times, Machine.here("cpu"), baseline=GROUPED,
        bytes_=moved(shape, dtype), ceiling=read,
        facts={name: {"clock": clock.__name__, "text": TEXT} for name in times},
    )  # fmt: skip
    return times, made


def two_threads(dense: Variant, options: argparse.Namespace) -> dict[str, Times]:
    """Dense decode on two threads, on the wall clock; it says nothing where a core is busy."""
    torch.set_num_threads(2)
    times = play({"cpu-dense-2-threads": dense}, options.rounds, time.perf_counter)
    torch.set_num_threads(options.threads)
    return times


def judge(shape: str, dtype: str, times: dict[str, Times], margin: float) -> list[str]:
    """Print each goal of this shape and dtype; gives those that fall short."""
    short = []
    for goal in GOALS:
        if shape not in goal.shapes or dtype not in goal.dtypes:
            continue
        if goal.above not in times or goal.below not in times:
            continue
        ratio = goal.ratio(times)
        holds = goal.holds(ratio, margin)
        sign = ">=" if goal.at_least else "<="
        verdict = "holds" if holds else "SHORT"
        line = f"{goal.name}: {ratio:.3g}, must {sign} {goal.must:g}, aim {goal.aim:g}"
        print(f"  {verdict}  {line}", flush=True)
        if not holds:
            short.append(f"{shape} {dtype} {line}")
    return short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="8k,32k,128k", help=f"of {', '.join(SHAPES)}, by comma")
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"of {', '.join(DTYPES)}, by comma")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=int, default=1024, help="MiB of caches per shape")
    parser.add_argument(
        "--baselines", default=GROUPED, help="names of baselines.py, all, or default"
    )
    parser.add_argument("--two-threads", action="store_true", help="also dense on two threads")
    parser.add_argument("--out", default="", help="file of rows to write or to add to")
    parser.add_argument("--gate", action="store_true", help="exit 1 where a ratio falls short")
    parser.add_argument("--margin", type=float, default=0.0, help="share that --gate lets pass")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    made, short = [], []
    for name in options.shapes.split(","):
        for dtype in options.dtypes.split(","):
            times, fresh = measure(SHAPES[name], DTYPES[dtype], options)
            print(rows_.table(fresh))
            short += judge(name, dtype, times, options.margin)
            made += fresh
    if options.out:
        rows_.write(options.out, made)
    for line in short:
        print(f"short: {line}", file=sys.stderr)
    return 1 if short and options.gate else 0


if __name__ == "__main__":
    raise SystemExit(main())
