"""Launch tables: data and pure functions of (device, dtype, head dim, group), never of the batch.

A row's bits follow from how its keys are cut, so nothing here may look at B, N, K_max or the page
size. A new GPU generation is one entry of `TABLE`.
"""

from functools import cache
from typing import NamedTuple

import torch

# A dot has at least 16 rows. A group of fewer query heads pads it, which costs nothing: the tensor
# cores idle otherwise, and without a dot the same loop takes more instructions even at group 1
# (docs/internals/triton-bounds.md). In float32 a dot is the CUDA cores' own (never TF32).
MIN_HEADS = 16
# Rows of a dot in one pass over the keys, heads of a group times queries of a row, and their output
# values at most: twice as many rows of a head dim above 128 spill.
MOST_ROWS = 64
MOST_VALUES = 64 * 128
# Rows above which a program of a tile of 16 bits has eight warps: four have no register to spare.
MANY_ROWS = 32
# Output values (padded heads x padded head dim) above which a program has `wide_warps`: with four
# warps the accumulator alone takes 64 registers of each thread.
WIDE = 4096
# Programs per multiprocessor that one long row should give, so that a batch of one fills the chip.
PER_SM = 2
# Conversions of float8_e4m3fn (`_float8.py`): by the chip's own, by packed integers in PTX, or by
# integers that any compiler takes, and the interpreter.
CHIP, INTEGERS, PLAIN = 1, 2, 3


class Tile(NamedTuple):
    """Bytes of a key tile (keys x padded head dim), warps, and stages of the loop over keys."""

    tile_bytes: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """One loop, by the bytes of an element."""

    half: Tile
    full: Tile


class Target(NamedTuple):
    """One GPU generation."""

    stream: Tiles  # score and dense decode
    gather: Tiles  # followers and the anchor's output
    wide_warps: int  # at least, where a program has more than WIDE output values
    min_split: int  # keys per program, at least
    max_splits: int  # programs per row and KV head, at most
    select_chunk: int  # slots per program
    select_top: int  # the chunk's largest that it lists: lines of 32, eight lines a step
    select_tile: int  # entries that the last program reads in one step
    select_warps: int
    select_lines: int  # chunks that the last program passes side by side, one per 32 threads
    float8: int = CHIP  # how bytes of float8_e4m3fn become numbers
    # Registers per thread, at most; 0 leaves the number to the compiler, which may spill a few to
    # fit more blocks.
    select_registers: int = 0
    wide_stream_registers: int = 0  # with more than WIDE output values
    many_rows_bytes: int = 16384  # of a key tile, with more than MANY_ROWS rows and 16 bits
    wide_gather_registers: int = 0  # the same, 16 bits


# 227 KiB of shared memory: three blocks of three stages per multiprocessor
_LARGE = Target(
    stream=Tiles(half=Tile(16384, 4, 3), full=Tile(16384, 8, 3)),
    gather=Tiles(half=Tile(16384, 4, 2), full=Tile(16384, 8, 2)),
    wide_warps=8,
    min_split=128,
    max_splits=64,
    select_chunk=1024,
    select_top=256,
    select_tile=4096,
    select_warps=16,
    select_lines=16,
    select_registers=128,
)
# 99 KiB: two stages, so that two blocks still fit
_SMALL = _LARGE._replace(
    select_tile=2048,
    select_warps=8,
    select_lines=8,
    many_rows_bytes=8192,  # in 16384 the mass, the output and the stored logits at once spill
    stream=Tiles(half=Tile(16384, 4, 2), full=Tile(16384, 8, 2)),
    # gathers of float32 by eight warps spill, in tiles of either size
    gather=Tiles(half=Tile(16384, 4, 2), full=Tile(8192, 4, 2)),
)
# 64 KiB; with eight wavefronts each has half of the registers, too few for wide output
_CDNA3 = _SMALL._replace(
    gather=Tiles(half=Tile(16384, 4, 2), full=Tile(8192, 8, 2)),
    wide_warps=4,
    select_lines=16,
    select_registers=0,
    float8=PLAIN,
)
_INTERPRETED = Tiles(half=Tile(16384, 4, 1), full=Tile(16384, 4, 1))
TABLE = {
    # sixteen warps spill with newer compilers, and so do three stages of wide float32
    "sm_80": _LARGE._replace(
        select_tile=2048,
        select_warps=8,
        select_lines=8,
        many_rows_bytes=8192,
        float8=INTEGERS,
        stream=Tiles(half=Tile(16384, 4, 3), full=Tile(16384, 8, 2)),
    ),
    "sm_86": _SMALL._replace(float8=INTEGERS),
    "sm_89": _SMALL,
    # eight warps spill in the output of a wide pruned anchor; so do four with many images, where
    # the compiler tries to fit a third block
    "sm_90": _LARGE._replace(wide_warps=4, wide_gather_registers=255),
    "sm_100": _LARGE,
    "sm_120": _SMALL._replace(wide_stream_registers=168),
    "gfx942": _CDNA3,
    # splits and chunks so short that a small case passes through every loop and merge
    "interpreter": Target(
        stream=_INTERPRETED,
        gather=_INTERPRETED,
        wide_warps=4,
        min_split=64,
        max_splits=8,
        select_chunk=64,
        select_top=16,
        select_tile=256,
        select_warps=4,
        select_lines=2,
        float8=PLAIN,
    ),
}


class Plan(NamedTuple):
    """The constants of one launch over keys."""

    block_h: int  # query heads of a KV head, of all queries of a pass, padded
    block_d: int  # head dim, padded
    block_n: int  # keys per step
    warps: int
    stages: int
    registers: int  # per thread, at most; 0 leaves the number to the compiler
    min_split: int
    max_splits: int


def _pow2(x: int) -> int:
    return 1 << (x - 1).bit_length()


@cache
def target_of(device: torch.device) -> tuple[str, int]:
    """Key of `TABLE` for a device, and its multiprocessors."""
    if device.type == "cpu":
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    known = sorted(int(name[3:]) for name in TABLE if name.startswith("sm_"))
    number = properties.major * 10 + properties.minor
    # an unlisted chip takes the newest entry at or below it
    at_most = [n for n in known if n <= number] or known[:1]
    return f"sm_{at_most[-1]}", properties.multi_processor_count


def table_of(device: torch.device) -> Target:
    """The entry of `TABLE` for a device."""
    return TABLE[target_of(device)[0]]


def queries_of_pass(queries: int, group: int, head_dim: int) -> int:
    """Queries of a row that one pass over its keys takes; the passes are of like size."""
    rows = min(MOST_ROWS, MOST_VALUES // max(16, _pow2(head_dim)))
    passes = -(-queries // max(1, rows // group))
    return -(-queries // passes)


def plan(
    target: str,
    sms: int,
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    itemsize: int,
    gather: bool,
    float8: bool = False,
) -> Plan:
    """Tile, splits and warps, from what does not depend on the batch; `itemsize` is that of q."""
    table = TABLE[target]
    tiles = table.gather if gather else table.stream
    tile = tiles.half if itemsize == 2 else tiles.full
    block_h = max(MIN_HEADS, _pow2(group))
    block_d = max(32 if float8 else 16, _pow2(head_dim))  # a dot takes at least 16 columns
    has_many = block_h > MANY_ROWS
    tile_bytes = tile.tile_bytes
    if has_many and itemsize == 2:
        tile_bytes = min(tile_bytes, table.many_rows_bytes)
    block_n = max(16, min(128, tile_bytes // (block_d * itemsize)))
    wide = block_h * block_d > WIDE
    registers = table.wide_stream_registers
    if gather:
        registers = table.wide_gather_registers if itemsize == 2 else 0
    warps = max(tile.warps, table.wide_warps) if wide else tile.warps
    if has_many:
        warps = max(warps, 8)
    # a row alone should fill the chip, but each split adds to the merge: at least 8, at most max
    wanted = -(-PER_SM * sms // kv_heads)
    return Plan(
        block_h=block_h,
        block_d=block_d,
        block_n=block_n,
        warps=warps,
        stages=tile.stages,
        registers=registers if wide else 0,
        min_split=max(table.min_split, block_n),
        max_splits=max(8, min(table.max_splits, wanted)),
    )
