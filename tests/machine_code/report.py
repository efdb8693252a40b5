"""What the latency model predicts for the machine code of today, beside the goals.

python tests/machine_code/report.py           # prints the tables
python tests/machine_code/report.py --write   # puts them into docs/internals/cuda-bounds.md
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpu_facts

from machine_code import facts, launches
from machine_code.facts import Use
from machine_code.launches import Step
from visionpulse import PulseConfig, schedule
from visionpulse.bench.latency import H200, Chain, Launched, Prediction, predict
from visionpulse.schedule import Role

TESTS = Path(__file__).resolve().parents[1]
PAGE = launches.ROOT / "docs" / "internals" / "cuda-bounds.md"
REGISTERS = json.loads((TESTS / "cuda_registers.json").read_text())
SHAPES = {"B1 16k": (1, 16384), "B8 32k": (8, 32768)}
SELECTS = {"16k": (1, 16384), "128k": (1, 131072)}
US = 1e6


class Stage(NamedTuple):
    """A kernel of a step, and its name in gpu_facts.moved."""

    step: str
    kernel: str
    moves: str = ""


STAGES = {
    "dense decode": Stage("dense", "attend", "dense decode"),
    "dense anchor, attention": Stage("anchor-dense", "score_", "anchor, dense output"),
    "pruned anchor, scan": Stage("anchor-pruned", "score_", "anchor, pruned: scan"),
    "pruned anchor, attend": Stage("anchor-pruned", "attend", "anchor, pruned: attend"),
    "follower": Stage("follower", "attend", "follower"),
    "score finish": Stage("anchor-pruned", "finish"),
    "select": Stage("anchor-pruned", "select"),
}


@cache
def chain(name: str, rows: int, visual: int, float8: bool = False, queries: int = 1) -> Chain:
    stage = STAGES[name]
    step = Step(stage.step, rows, visual, float8=float8, queries=queries)
    walk = Use(step, stage.kernel).walk()
    return facts.chain_of(walk, step) if stage.moves else facts.lone_chain_of(walk)


@cache
def predicted(
    name: str,
    rows: int,
    visual: int,
    chained: bool = False,
    float8: bool = False,
    queries: int = 1,
) -> Prediction:
    stage = STAGES[name]
    step = Step(stage.step, rows, visual, float8=float8, queries=queries)
    launch = Use(step, stage.kernel).launch
    of = chain(name, rows, visual, float8, queries)
    chip = gpu_facts.CHIPS["sm_90"]
    resident = chip.blocks_of(launch.threads, REGISTERS[launch.kernel], launch.shared_bytes)
    if stage.moves:
        blocks = rows * launch.grid[1] * of.parts
        moved = gpu_facts.moved(stage.moves, rows, visual, float8)
    else:  # logits of all heads and a score of each; or each score
        blocks = launch.grid[0] * launch.grid[1]
        per = 4 * (gpu_facts.HEADS + 1) if name == "score finish" else 4
        moved = per * rows * visual
    return predict(of, Launched(blocks, resident, launch.threads // 32, moved), chained=chained)


def microseconds(
    *names: str, shape: tuple[int, int], chained: bool = False, float8: bool = False
) -> float:
    """Of launches one behind the other."""
    each = [predicted(n, *shape, chained or at > 0, float8) for at, n in enumerate(names)]
    return sum(one.seconds for one in each) * US


PRUNED = ("pruned anchor, scan", "score finish", "select", "pruned anchor, attend")


def layers(shape: tuple[int, int], float8: bool = False) -> float:
    """Microseconds of all 36 attention layers of a step, schedule "paper"."""
    times = {
        Role.DENSE: microseconds("dense decode", shape=shape, chained=True, float8=float8),
        Role.ANCHOR: microseconds(*PRUNED, shape=shape, chained=True, float8=float8),
        Role.FOLLOWER: microseconds("follower", shape=shape, chained=True, float8=float8),
    }
    return sum(times[role] for role in schedule.roles(PulseConfig(), (True,) * 36, 1))


# (row, prediction of each shape, must, aim), in microseconds but for the gains.
def goals() -> Iterator[tuple[str, tuple[float, ...], tuple[float, ...], tuple[float, ...]]]:
    both = tuple(SHAPES.values())

    def of(*names: str) -> tuple[float, ...]:
        return tuple(microseconds(*names, shape=shape) for shape in both)

    copy = gpu_facts.microseconds(gpu_facts.moved("dense decode", *both[1]))
    yield "dense decode", of("dense decode"), (27, copy / 0.90), (24, copy / 0.95)
    yield "dense anchor, attention", of("dense anchor, attention"), (29, 285), (27, 265)
    yield "pruned anchor, scan + V", of(PRUNED[0], PRUNED[3]), (24, 175), (18, 150)
    yield "follower, 5 % kept", of("follower"), (9, 24), (6, 20)
    fa3 = (27.2, 253.0)  # of a layer
    gains = tuple(36 * one / layers(shape) for one, shape in zip(fa3, both, strict=True))
    yield "36 layers: FA3 over ours", gains, (1.45, 1.7), (1.6, 1.85)
    selects = tuple(microseconds("select", shape=shape) for shape in SELECTS.values())
    yield "select 16k, 128k", selects, (10, 17), (8, 14)


def beside_goals() -> Iterator[str]:
    yield "| us, " + "; ".join(SHAPES) + " | predicted | must | aim |"
    yield "|---|---|---|---|"
    for name, found, must, aim in goals():
        short = 2 if "over" in name else 0
        cells = ["; ".join(f"{x:.{short or 1}f}" for x in found)]
        cells += ["; ".join(f"{x:.{short}f}" for x in row) for row in (must, aim)]
        yield f"| {name} | {' | '.join(cells)} |"


def float8() -> Iterator[str]:
    """A cache of 8 bits beside one of bfloat16."""
    yield "| us, " + "; ".join(SHAPES) + " | bfloat16 | 8 bits | gain |"
    yield "|---|---|---|---|"
    rows = {
        "dense decode": ("dense decode",), "dense anchor, attention": ("dense anchor, attention",),
        "pruned anchor, scan + V": (PRUNED[0], PRUNED[3]), "follower, 5 % kept": ("follower",),
    }  # fmt: skip
    for name, of in rows.items():
        yield compared(name, partial(both_kinds, of))
    yield compared("36 layers", layers)


def both_kinds(names: tuple[str, ...], shape: tuple[int, int], float8: bool) -> float:
    return microseconds(*names, shape=shape, float8=float8)


def compared(name: str, of: Callable[[tuple[int, int], bool], float]) -> str:
    wide, narrow = ([of(shape, float8) for shape in SHAPES.values()] for float8 in (False, True))
    gains = [a / b for a, b in zip(wide, narrow, strict=True)]
    cells = ["; ".join(f"{x:.1f}" for x in row) for row in (wide, narrow)]
    return f"| {name} | {' | '.join(cells)} | {'; '.join(f'{gain:.2f}' for gain in gains)} |"


def queries() -> Iterator[str]:
    """Several queries of a row over one: the goal is that of 8, B8 32k."""
    yield "| dense decode, queries of a row | B1 16k us | over one | B8 32k us | over one |"
    yield "|---|---|---|---|---|"
    one = [predicted("dense decode", *shape).seconds for shape in SHAPES.values()]
    for count in (1, 2, 4, 8, 16):
        cells = []
        for shape, base in zip(SHAPES.values(), one, strict=True):
            seconds = predicted("dense decode", *shape, queries=count).seconds
            cells += [f"{seconds * US:.1f}", f"{seconds / base:.2f}"]
        yield f"| {count} | {' | '.join(cells)} |"


# (query heads, KV heads): groups of models, and the largest that there may be
GROUPS = ((32, 8), (64, 8), (28, 4), (128, 8), (64, 4), (256, 8), (32, 2), (32, 1))


def groups() -> Iterator[str]:
    """Trips behind the last key where more query heads share a KV head; goal: 10 of any group."""
    yield (
        "| query heads / KV heads, B1 16k | group | splits | trips behind: dense | follower "
        "| merge of dense, us |"
    )
    yield "|---|---|---|---|---|---|"
    for heads, kv_heads in GROUPS:
        dense, follower = (
            facts.chain_of(Use(step, "attend").walk(), step)
            for step in (
                Step(name, *SHAPES["B1 16k"], heads=heads, kv_heads=kv_heads)
                for name in ("dense", "follower")
            )
        )
        yield (
            f"| {heads} / {kv_heads} | {heads // kv_heads} | {dense.parts} | {dense.trips_behind} "
            f"| {follower.trips_behind} | {dense.merge / H200.clock * US:.1f} |"
        )


def parts() -> Iterator[str]:
    """Of what each prediction is made."""
    yield "| us | launch | head | body | finish | merge | waves | trips before, behind |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, stage in STAGES.items():
        for label, shape in (SELECTS if name == "select" else SHAPES).items():
            one, of = predicted(name, *shape), chain(name, *shape)
            times = (one.launch, one.head, one.body, one.finish, one.merge)
            trips = f"{of.trips_before}, {of.trips_behind}" if stage.moves else f"{of.trips_before}"
            cells = " | ".join(f"{t * US:.1f}" for t in times)
            yield f"| {name}, {label} | {cells} | {one.waves:.1f} | {trips} |"


# Published times of others on an H200, in microseconds, and what this model says of the same work.
# Differences of two rows of one table leave what the kernels have no part in out.
def published() -> Iterator[tuple[str, float, float]]:
    def dense(rows: int, keys: int) -> float:
        return 2 * rows * keys * 8 * 128 * 2 / gpu_facts.BANDWIDTH * US  # 8 KV heads, K and V

    k = 1024
    yield "sglang, dense layer, B8 32k less B8 16k", 323 - 205, dense(8, 16 * k)
    yield "sglang, dense layer, B8 128k less B8 32k", 1040 - 323, dense(8, 96 * k)
    # its machine code is not read here: this is what the model said of our follower while it had
    # eight trips before the first key and five behind the last tile
    yield "FlashMLA sparse, bucket 8: above its 3.2 of bytes; 13 trips", 16.8 - 3.2, 12.0


def errors() -> Iterator[str]:
    yield "| published, H200 | measured us | model us | error |"
    yield "|---|---|---|---|"
    for name, measured, model in published():
        yield f"| {name} | {measured:.1f} | {model:.1f} | {100 * (model / measured - 1):+.0f} % |"


TABLES = {
    "goals": beside_goals, "float8": float8, "queries": queries, "parts": parts, "groups": groups,
    "errors": errors,
}  # fmt: skip


def write() -> None:
    """Replace each table of the page, found by its first line."""
    page = PAGE.read_text()
    for make in TABLES.values():
        lines = list(make())
        begin = page.index(lines[0])
        page = page[:begin] + "\n".join(lines) + page[page.index("\n\n", begin) :]
    PAGE.write_text(page)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    for make in TABLES.values():
        print("\n".join(make()), end="\n\n")
