"""A latency model: from the serial chain of a kernel's machine code to predicted seconds.

A prediction is no measurement. The chain is that of one warp that is alone; the model adds
bandwidth, issue slots, and blocks that take turns. Its weakest part is a launch of several waves,
where blocks hide each other's prologues only as far as memory has room.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """What a prediction takes of a GPU."""

    multiprocessors: int
    clock: float  # Hz
    copy: float  # bytes/s that a copy reaches
    issue: int  # instructions that a multiprocessor starts in a cycle
    launch: float  # seconds of a launch by itself, between two events
    chained: float  # seconds from a launch to the next, with programmatic dependent launch


# Multiprocessors and 4 schedulers each: NVIDIA's H100 whitepaper. Assumed: the clock, below a boost
# of 1.98 GHz; a copy of 4.3 of 4.8 TB/s, where timings of sglang imply 4.5 for attention over long
# rows; both times of a launch.
H200 = Chip(132, 1.83e9, 4.3e12, 4, 3.0e-6, 1.0e-6)


class Chain(NamedTuple):
    """A warp's way through the block that arrives last of its row; cycles, as if it were alone."""

    parts: int  # blocks of a KV head of a row
    tiles: int  # of a warp; 0: no keys are streamed, and all lies in the head
    trips_before: int  # dependent trips to memory before the first key is asked for
    trips_behind: int  # behind the last tile, to the output
    head: int  # from the start to the first copy of a key
    tile: float
    tile_instructions: float
    finish: int  # from the last tile to the arrival
    merge: int  # from the arrival to the end


class Launched(NamedTuple):
    """How a kernel is launched, and what it moves."""

    blocks: int
    resident: int  # blocks that a multiprocessor holds
    warps: int  # of a block
    bytes: float


class Prediction(NamedTuple):
    """Seconds, and what they are made of."""

    launch: float
    head: float
    body: float  # the longest of: bytes, tiles of one warp, waves of blocks
    finish: float
    merge: float
    waves: float

    @property
    def seconds(self) -> float:
        """All of the launch."""
        return self.launch + self.head + self.body + self.finish + self.merge


def predict(
    chain: Chain, launched: Launched, chip: Chip = H200, chained: bool = False
) -> Prediction:
    """One launch, by itself or behind another one."""
    cycle = 1 / chip.clock
    waves = launched.blocks / (chip.multiprocessors * launched.resident)
    # a tile takes what the warps of a multiprocessor issue for one of each, at least
    resident = min(launched.resident, launched.blocks / chip.multiprocessors)
    issue = chain.tile_instructions * launched.warps * resident / chip.issue
    tiles = chain.tiles * max(chain.tile, issue) * cycle
    head, finish, merge = chain.head * cycle, chain.finish * cycle, chain.merge * cycle
    body = max(launched.bytes / chip.copy, tiles)
    if waves > 1:  # the first head and the last finish are in front of it and behind it
        body = max(body, waves * (head + tiles + finish) - head - finish)
    launch = chip.chained if chained else chip.launch
    return Prediction(launch, head, body, finish, merge, waves)


def in_flight(tiles: int, stages: int, tile_bytes: int, warps: float) -> float:
    """Bytes that the warps of a multiprocessor ask for at once: no more than they have tiles."""
    return min(tiles, stages - 1) * tile_bytes * warps
