"""Launch tables: data and pure functions of (device, dtype, head dim, group), never of the batch.

A row's bits follow from how its keys are cut, so nothing here may look at B, N, K_max or the page
size. A new GPU generation is one row in `TABLE`.
"""

import os
from functools import cache
from typing import NamedTuple

import torch

# Query heads per KV head from which tensor cores pay: below, their 16 rows are mostly padding.
DOT_FROM = 8
# Slots above which several programs of a row write its kept positions.
LONG_ROW = 32768
# Programs per multiprocessor that one long row should give, so that a batch of one fills the chip.
PER_SM = 2


class Tile(NamedTuple):
    """Bytes of a key tile (keys x padded head dim), warps, and stages of the loop over keys."""

    tile_bytes: int
    warps: int
    stages: int


class Target(NamedTuple):
    """One GPU generation."""

    stream: Tile  # scan and dense decode, CUDA cores
    stream_dot: Tile  # the same on tensor cores
    gather: Tile  # followers and the anchor's output
    gather_dot: Tile
    min_split: int  # keys a program gets at least
    max_splits: int  # programs a row gets at most, per KV head
    rank_chunk: int  # slots that one program ranks
    rank_tile: int  # keys that the last program looks at in one step
    rank_warps: int


_NVIDIA = Target(
    stream=Tile(16384, 4, 2),
    stream_dot=Tile(16384, 4, 3),
    gather=Tile(8192, 4, 1),
    gather_dot=Tile(16384, 4, 2),
    min_split=128,
    max_splits=64,
    rank_chunk=512,
    rank_tile=2048,
    rank_warps=8,
)
_CDNA3 = _NVIDIA._replace(stream_dot=Tile(16384, 4, 2), gather_dot=Tile(16384, 4, 2))
TABLE = {
    "sm_80": _NVIDIA,
    "sm_86": _NVIDIA,
    "sm_89": _NVIDIA,
    "sm_90": _NVIDIA,
    "sm_100": _NVIDIA,
    "sm_120": _NVIDIA,
    "gfx942": _CDNA3,
    # tiles so small that a short row passes through every loop, split and merge
    "interpreter": Target(
        stream=Tile(4096, 4, 1),
        stream_dot=Tile(4096, 4, 1),
        gather=Tile(4096, 4, 1),
        gather_dot=Tile(4096, 4, 1),
        min_split=64,
        max_splits=8,
        rank_chunk=64,
        rank_tile=128,
        rank_warps=4,
    ),
}


class Plan(NamedTuple):
    """The constants of one launch over keys."""

    dot: bool
    rows: int  # query heads of a KV head, padded
    block_d: int  # head dim, padded
    block_n: int  # keys per step
    warps: int
    stages: int
    sub: int  # partial sums over keys per head where no tensor core adds them
    min_split: int
    max_splits: int


def _pow2(x: int) -> int:
    return 1 << (x - 1).bit_length()


@cache
def target_of(device: torch.device) -> tuple[str, int]:
    """Name of the row of `TABLE` for a device, and its multiprocessors."""
    if device.type == "cpu":
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    known = f"sm_{properties.major}{properties.minor}"
    # an unlisted chip takes the newest row at or below it
    numbers = sorted(int(name[3:]) for name in TABLE if name.startswith("sm_"))
    at_most = [n for n in numbers if n <= int(known[3:])] or numbers[:1]
    return f"sm_{at_most[-1]}", properties.multi_processor_count


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def plan(
    target: str, sms: int, *, kv_heads: int, group: int, head_dim: int, itemsize: int, gather: bool
) -> Plan:
    """Choose tile, splits and warps from what does not depend on the batch."""
    row = TABLE[target]
    dot = group >= DOT_FROM
    tile = (row.gather_dot if dot else row.gather) if gather else (row.stream_dot if dot else row.stream)
    block_d = max(16, _pow2(head_dim))
    block_n = max(16, min(128, tile.tile_bytes // (block_d * itemsize)))
    # a row alone should fill the chip, but partial sums cost: a power of two between 8 and the most
    wanted = _pow2(-(-PER_SM * sms // kv_heads))
    return Plan(
        dot=dot,
        rows=max(16, _pow2(group)) if dot else _pow2(group),
        block_d=block_d,
        block_n=block_n,
        warps=tile.warps,
        stages=tile.stages,
        sub=min(block_n, 16),
        min_split=max(row.min_split, block_n),
        max_splits=max(8, min(row.max_splits, wanted)),
    )
