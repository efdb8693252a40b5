"""Device time of the launches that the latency model stands or falls with, L2 cold.

    python benchmarks/profile_launches.py
    ncu --profile-from-start off --set full --cache-control all -o launches \\
        python benchmarks/profile_launches.py --once

`dense` of one row of 16k has several splits of each KV head: how long is their merge? `follower` of
eight rows of 32k has more blocks than the chip holds at once: how long is the start of each?
docs/internals/cuda-bounds.md predicts both for CUDA on an H200, which is printed beside. Kernels
are timed by themselves, without their launch.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from profile_decode import captured, recorded
from profile_ranges import Kernel, read
from profile_table import OTHER, summed
from shapes import SHAPES, Layers

import visionpulse as vp
from visionpulse.bench import cost
from visionpulse.bench.timing import empty_l2

ROUNDS = 20
LAUNCHES = {"dense": "b1-16k", "follower": "b8-32k"}
PAGE = Path(__file__).parents[1] / "docs" / "internals" / "cuda-bounds.md"
PREDICTED = {"dense": "dense decode, B1 16k", "follower": "follower, B8 32k"}  # rows of the page


def launch_of(name: str, shape: str, backend: str, device: str) -> Callable[[], object]:
    """One launch, warmed, on inputs of its own."""
    layers = Layers.make(SHAPES[shape], torch.bfloat16, device, budget=0)
    q, kv = layers.at(0)
    shared = {"workspace": vp.Workspace(), "backend": backend}
    if name == "dense":
        run = lambda: vp.attend(q, kv, **shared)  # noqa: E731
    else:
        kept = vp.decode(q, kv, layers.visual, layers.shape.config(), **shared)[1]
        run = lambda: vp.attend(q, kv, layers.visual, kept, **shared)  # noqa: E731
    run()
    return run


def bytes_of(name: str, shape: str) -> int:
    problem, kept = SHAPES[shape].cost(torch.bfloat16), SHAPES[shape].kept
    return (cost.dense(problem) if name == "dense" else cost.attend(problem, kept)).bytes


def predicted(name: str) -> float:
    """Microseconds of the latency model: head, body, finish and merge."""
    row = next(r for r in PAGE.read_text().splitlines() if r.startswith(f"| {PREDICTED[name]} |"))
    return sum(float(cell) for cell in row.split("|")[3:7])


def ours(kernels: list[Kernel]) -> list[float]:
    """Microseconds of our kernels; what empties L2 is none."""
    return [kernel.duration for kernel in kernels if summed([], [kernel])[0].name != OTHER]


def measured(run: Callable[[], object], device: torch.device) -> list[float]:
    def rounds() -> None:
        for _ in range(ROUNDS):
            empty_l2()
            run()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded(rounds, device, path)
        return ours(read(path)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", default="cuda,triton", help="by comma")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--once", action="store_true", help="one launch of each, for a profiler")
    options = parser.parse_args()
    missing = 0
    for backend in options.backends.split(","):
        for name, shape in LAUNCHES.items():
            run = launch_of(name, shape, backend, options.device)
            if options.once:
                empty_l2()
                with captured(torch.device(options.device)):
                    run()
                continue
            times = measured(run, torch.device(options.device))
            missing += len(times) != ROUNDS
            if not times:
                print(f"{backend} {name} {shape}: the profiler saw no kernel", file=sys.stderr)
                continue
            best, middle = min(times), statistics.median(times)
            rate = bytes_of(name, shape) / best / 1e3
            model = f", {predicted(name):.1f} us predicted" if backend == "cuda" else ""
            print(f"{backend} {name} {shape}: best {best:.1f} us, median {middle:.1f} us{model}, "
                  f"{rate:.0f} GB/s, {len(times)} launches")  # fmt: skip
    return missing


if __name__ == "__main__":
    sys.exit(main())
