"""What plans, registers and the sizes of a step imply for the CUDA kernels.

`python tests/cusim/bounds.py` prints the tables of docs/internals/cuda-bounds.md, which a test
compares with the page. Plans come from the engine's own host functions, registers from
cuda_registers.json.
"""

import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from build import FEW, build, load
from visionpulse.bench.latency import in_flight

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_facts import (
    CHIPS,
    HEAD_DIM,
    HEADS,
    IN_FLIGHT,
    KV_HEADS,
    SMS,
    TEXT,
    kept_of,
    microseconds,
    moved,
)  # fmt: skip

TABLE = Path(__file__).resolve().parents[1] / "cuda_registers.json"
REGISTERS = json.loads(TABLE.read_text())
BFLOAT16, FLOAT8 = 1, 3  # kinds of kernels, as args.h numbers them
TILE = {BFLOAT16: 16, FLOAT8: 32}  # keys of a tile
SHAPES = {
    "B1 16k": (1, 16384), "B1 128k": (1, 131072), "B8 16k": (8, 16384), "B8 32k": (8, 32768),
}  # fmt: skip
# (compute capability, multiprocessors, shared memory that a block may ask for)
PARTS = {
    "sm_80": (80, 108, 166912), "sm_86": (86, 82, 101376), "sm_89": (89, 58, 101376),
    "sm_90": (90, SMS, 232448), "sm_100": (100, 148, 232448), "sm_120": (120, 170, 101376),
}  # fmt: skip


class Use(NamedTuple):
    """A stream kernel in a step: whether it scores, and what it streams."""

    scores: bool
    keys: bool
    values: bool
    listed: bool = False  # text and the kept alone
    kind: int = BFLOAT16


KERNELS = {
    "dense decode": Use(False, True, True),
    "anchor, dense output": Use(True, True, True),
    "anchor, pruned: scan": Use(True, True, False),
    "anchor, pruned: attend": Use(False, False, True, listed=True),
    "follower": Use(False, True, True, listed=True),
}
EIGHT = ", 8 bits"
NARROW = {name + EIGHT: use._replace(kind=FLOAT8) for name, use in KERNELS.items()}


@cache
def engine() -> Any:
    """The host functions, with the kernels that the tables speak of."""
    return load(build(kernels=FEW))


def plan_of(use: Use, target: str = "sm_90", capacity: int = 1 << 17) -> dict[str, Any]:
    shape = (use.kind, 1, HEADS, KV_HEADS, HEAD_DIM, capacity)
    return engine().plan(use.scores, PARTS[target], shape, use.keys, use.values, use.listed)


def resident(use: Use, target: str) -> int:
    """Blocks of a multiprocessor."""
    plan = plan_of(use, target)
    kernel = plan["kernel"]
    return CHIPS[target].blocks_of(plan["warps"] * 32, REGISTERS[kernel], plan["shared_bytes"])


def keys_of(use: Use, visual: int) -> int:
    return TEXT + (kept_of(visual) if use.listed else visual)


def occupancy() -> Iterator[str]:
    """On sm_90: what a block holds, how many fit, and the bytes in flight that follow."""
    yield (
        "| kernel | entry | registers | warps x stages | shared KiB | blocks per multiprocessor "
        "| tiles of a warp: " + ", ".join(SHAPES) + " | KB in flight | bound by |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, use in (KERNELS | NARROW).items():
        plan, blocks = plan_of(use), resident(use, "sm_90")
        teams, tiles, flying, bound = plan["warps"] // plan["team"], [], [], []
        for rows, visual in SHAPES.values():
            keys = keys_of(use, visual)
            splits = engine().splits(plan["rule"], keys, KV_HEADS)
            there = min(blocks, rows * KV_HEADS * splits / SMS)
            # a block has whole tiles of each of its teams
            tiles.append(math.ceil(keys / splits / (teams * TILE[use.kind])))
            asked = in_flight(tiles[-1], plan["stages"], plan["stage_bytes"], teams * there)
            flying.append(asked)
            # a warp with fewer tiles than stages spends its life in front of and behind them
            filled = tiles[-1] >= plan["stages"] and asked >= IN_FLIGHT
            bound.append("memory" if filled else "latency")
        yield (
            f"| {name} | `{plan['kernel']}` | {REGISTERS[plan['kernel']]} "
            f"| {plan['warps']} x {plan['stages']} | {plan['shared_bytes'] / 1024:.0f} | {blocks} "
            f"| {', '.join(map(str, tiles))} "
            f"| {', '.join(f'{bytes_ / 1000:.0f}' for bytes_ in flying)} | {', '.join(bound)} |"
        )


def everywhere() -> Iterator[str]:
    """Blocks per multiprocessor on every architecture."""
    yield "| blocks | " + " | ".join(PARTS) + " |"
    yield "|---|" + "---|" * len(PARTS)
    for name, use in (KERNELS | NARROW).items():
        yield f"| {name} | " + " | ".join(str(resident(use, target)) for target in PARTS) + " |"


def traffic() -> Iterator[str]:
    """Bytes of each kernel, and the time of a copy of as many; no measured time yet."""
    yield "| kernel: MB, us at the rate of a copy | " + " | ".join(SHAPES) + " | measured |"
    yield "|---|" + "---|" * (len(SHAPES) + 1)
    for name in (*KERNELS, *NARROW):
        wide = name.removesuffix(EIGHT)
        cells = (moved(wide, *shape, float8=wide != name) for shape in SHAPES.values())
        shown = (f"{bytes_ / 1e6:.1f}, {microseconds(bytes_):.1f}" for bytes_ in cells)
        yield f"| {name} | {' | '.join(shown)} | |"


TABLES = {"traffic": traffic, "occupancy": occupancy, "everywhere": everywhere}

if __name__ == "__main__":
    for make in TABLES.values():
        print("\n".join(make()), end="\n\n")
