"""What the table of limits and the sizes of a step imply: `python tests/triton/bounds.py`.

Prints the tables of docs/internals/triton-bounds.md; a test compares the two.
Occupancy follows from limits.json and the launch tables, bytes from the cost model.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from visionpulse._triton import tuning

from visionpulse.bench import cost

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_facts import (
    BANDWIDTH,
    CHIPS,
    HEAD_DIM,
    HEADS,
    IN_FLIGHT,
    ITEMSIZE,
    KV_HEADS,
    SMS,
    TEXT,
    kept_of,
    microseconds,
    step,
)  # fmt: skip

LIMITS = json.loads(Path(__file__).with_name("limits.json").read_text())
SHAPES = {"B1 16k": (1, 16384), "B8 32k": (8, 32768)}  # rows, visual tokens


class Use(NamedTuple):
    """A kernel in a step: its entry in limits.json, its loop, the tensors that it stages."""

    row: str
    kernel: str
    loop: str | None
    tensors: int
    float8: bool = False  # K and V of 8 bits


BFLOAT16 = {
    "dense decode": Use("dense-bfloat16", "_score_kernel", "stream", 2),
    "score, pruned": Use("pruned-bfloat16", "_score_kernel", "stream", 1),
    "score, dense output": Use("dense-anchor-bfloat16", "_score_kernel", "stream", 2),
    "attend, anchor": Use("pruned-bfloat16", "_attend_kernel", "gather", 1),
    "attend, follower": Use("follow-bfloat16", "_attend_kernel", "gather", 2),
    "select": Use("pruned-bfloat16", "_select_kernel", None, 0),
}
FLOAT8 = {
    f"{name}, 8 bits": use._replace(row=use.row.replace("bfloat16", "float8"), float8=True)
    for name, use in BFLOAT16.items()
    if use.loop
}
KERNELS = BFLOAT16 | FLOAT8


def blocks_of(name, target):
    """Blocks of a kernel that fit on a multiprocessor; its threads, registers, shared bytes."""
    row, kernel, loop, *_ = KERNELS[name]
    registers, shared, _ = LIMITS[row][kernel][target]
    table, chip = tuning.TABLE[target], CHIPS[target]
    warps = getattr(table, loop).half.warps if loop else table.select_warps
    threads = warps * chip.warp
    return chip.blocks_of(threads, registers, shared), threads, registers, shared


def plan_of(name):
    return tuning.plan(
        "sm_90", SMS, kv_heads=KV_HEADS, group=HEADS // KV_HEADS, head_dim=HEAD_DIM,
        itemsize=ITEMSIZE, gather=KERNELS[name].loop == "gather", float8=KERNELS[name].float8,
    )  # fmt: skip


def programs(name, shape):
    """Programs of a launch, all rows: splits of a row's keys times KV heads."""
    rows, visual = SHAPES[shape]
    gathered = KERNELS[name].loop == "gather"
    n = TEXT + (kept_of(visual) if gathered else visual)
    plan = plan_of(name)
    per_split = max(
        plan.min_split, math.ceil(math.ceil(n / plan.max_splits) / plan.block_n) * plan.block_n
    )
    return rows * KV_HEADS * math.ceil(n / per_split)


def occupancy():
    """On sm_90: what a block uses, how many fit, and the bytes in flight that follow."""
    yield (
        "| kernel | threads | registers | shared KiB | blocks per multiprocessor | KB in flight: "
        + ", ".join(SHAPES) + " | bound by: " + ", ".join(SHAPES) + " |"
    )  # fmt: skip
    yield "|---|---|---|---|---|---|---|"
    for name, use in KERNELS.items():
        blocks, threads, registers, shared = blocks_of(name, "sm_90")
        held = f"| {name} | {threads} | {registers} | {shared / 1024:.0f} | {blocks} "
        if use.loop is None:
            yield held + "| | the last program of a row: instructions and latency |"
            continue
        plan = plan_of(name)
        key = HEAD_DIM * (1 if use.float8 else ITEMSIZE)
        staged = (plan.stages - 1) * use.tensors * plan.block_n * key
        flying = [min(blocks, programs(name, shape) / SMS) * staged for shape in SHAPES]
        bound = ["memory" if bytes_ >= IN_FLIGHT else "latency" for bytes_ in flying]
        numbers = ", ".join(f"{bytes_ / 1000:.0f}" for bytes_ in flying)
        yield held + f"| {numbers} | {', '.join(bound)} |"


def everywhere():
    """Blocks per multiprocessor on every target."""
    yield "| blocks | " + " | ".join(CHIPS) + " |"
    yield "|---|" + "---|" * len(CHIPS)
    for name in KERNELS:
        held = " | ".join(str(blocks_of(name, target)[0]) for target in CHIPS)
        yield f"| {name} | {held} |"


def moved(name, rows, visual):
    """Bytes that a kernel moves from and to memory: inputs, outputs, and stored logits."""
    shape, kept = step(rows, visual), kept_of(visual)
    if KERNELS[name].float8:
        shape = shape._replace(kv_itemsize=1)
    one = rows * KV_HEADS * HEAD_DIM * (1 if KERNELS[name].float8 else ITEMSIZE)  # K of a position
    logits = 4 * rows * HEADS * shape.keys
    return {
        "dense decode": cost.dense(shape).bytes,
        "score, pruned": shape.keys * one + logits,
        "score, dense output": cost.dense(shape).bytes + logits,
        "attend, anchor": (TEXT + kept) * one,
        "attend, follower": cost.attend(shape, kept).bytes,
    }[name.removesuffix(", 8 bits")]


def traffic():
    """Bytes of each kernel and their time at the speed of a copy; no measured time yet."""
    columns = " | ".join(f"{shape}: MB, us at {BANDWIDTH / 1e12} TB/s" for shape in SHAPES)
    yield f"| kernel | {columns} | measured |"
    yield "|---|" + "---|" * (len(SHAPES) + 1)
    for name, use in KERNELS.items():
        if use.loop is None:
            continue
        cells = (moved(name, *shape) for shape in SHAPES.values())
        shown = (f"{bytes_ / 1e6:.1f}, {microseconds(bytes_):.1f}" for bytes_ in cells)
        yield f"| {name} | {' | '.join(shown)} | |"
    rows, visual = SHAPES["B8 32k"]
    parts = ("score, pruned", "attend, anchor")
    pruned = sum(moved(name, rows, visual) for name in parts)
    whole = moved("dense decode", rows, visual)
    output = moved("score, dense output", rows, visual)
    yield ""
    yield (
        f"By these bytes a pruned anchor takes {pruned / whole:.2f} of dense at B8 32k before "
        f"select and launches, a dense anchor {output / whole:.2f}."
    )


TABLES = {"occupancy": occupancy, "everywhere": everywhere, "traffic": traffic}

if __name__ == "__main__":
    for make in TABLES.values():
        print("\n".join(make()), end="\n\n")
