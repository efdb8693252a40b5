"""What the pages of bounds take as given: limits of GPUs, a rate of memory, sizes of a step."""

import math
from typing import NamedTuple

from visionpulse.bench import cost

HEADS, KV_HEADS, HEAD_DIM, ITEMSIZE = 32, 8, 128, 2
TEXT, KEPT = 256, 0.05
BANDWIDTH = 4.3e12  # bytes/s that a copy reaches on an H200
SMS, LATENCY = 132, 1e-6  # its multiprocessors, seconds until a byte asked for arrives
IN_FLIGHT = BANDWIDTH / SMS * LATENCY  # bytes that hide a trip to memory, of a multiprocessor


class Chip(NamedTuple):
    """What the blocks of one multiprocessor share."""

    registers: int  # of 32 bits
    shared: int  # bytes
    threads: int
    blocks: int
    warp: int = 32
    reserved: int = 1024  # bytes of shared memory that each block costs beside its own

    def blocks_of(self, threads: int, registers: int, shared: int) -> int:
        """Blocks of a kernel that one multiprocessor holds."""
        return min(
            self.registers // (registers * threads), self.shared // (shared + self.reserved),
            self.threads // threads, self.blocks,
        )  # fmt: skip


# The CUDA programming guide's compute capabilities; CDNA3: 4 SIMDs of 512 x 64 registers, 8 waves
CHIPS = {
    "sm_80": Chip(65536, 164 << 10, 2048, 32),
    "sm_86": Chip(65536, 100 << 10, 1536, 16),
    "sm_89": Chip(65536, 100 << 10, 1536, 24),
    "sm_90": Chip(65536, 228 << 10, 2048, 32),
    "sm_100": Chip(65536, 228 << 10, 2048, 32),
    "sm_120": Chip(65536, 100 << 10, 1536, 24),
    "gfx942": Chip(131072, 64 << 10, 2048, 32, warp=64, reserved=0),
}


def step(rows: int, visual: int) -> cost.OpShape:
    """One decode step of the shape that the pages speak of."""
    return cost.OpShape(rows, HEADS, KV_HEADS, HEAD_DIM, TEXT, visual, ITEMSIZE)


def kept_of(visual: int) -> int:
    """Visual tokens that a row keeps."""
    return math.floor(KEPT * visual)


def microseconds(bytes_: float) -> float:
    """The time of a copy."""
    return bytes_ / BANDWIDTH * 1e6


def moved(name: str, rows: int, visual: int, float8: bool = False) -> int:
    """Bytes that a kernel must move, and the logits that it leaves or takes."""
    shape, kept = step(rows, visual), kept_of(visual)
    one = rows * KV_HEADS * HEAD_DIM * (1 if float8 else ITEMSIZE)  # the keys of one position
    saved = 2 * (rows * KV_HEADS * HEAD_DIM * ITEMSIZE - one)  # of its keys and values
    dense = cost.dense(shape).bytes - shape.keys * saved
    return {
        "dense decode": dense,
        "anchor, dense output": dense + 4 * rows * HEADS * visual,
        "anchor, pruned: scan": shape.keys * (one + 4 * rows * HEADS),
        "anchor, pruned: attend": (TEXT + kept) * (one + 4 * rows * HEADS),
        "follower": cost.attend(shape, kept).bytes - (TEXT + kept) * saved,
    }[name]
