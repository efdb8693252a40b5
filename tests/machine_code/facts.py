"""What the machine code of each launch says about latency, and what must hold of any kernel."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from visionpulse.bench.latency import Chain

from .launches import ROOT, Launch, Step, arrays_of, cubin, launches_of
from .sass import ACQUIRES, FENCES, Instruction, Kernel, Loop, loops_of, read
from .walk import ARRAY_BITS, Event, Walk

BARRIERS = ("BAR", "UCGABAR_WAIT")


@dataclass(frozen=True)
class Use:
    """A launch of a step: the first kernel whose name holds `kernel`."""

    step: Step
    kernel: str

    @property
    def launch(self) -> Launch:
        return next(one for one in launches_of(self.step) if self.kernel in one.kernel)

    def code(self, root: Path = ROOT, target: str = "90") -> Kernel:
        name = self.launch.kernel
        source = next(s for s in ("attend", "select", "score_finish", "score") if s in name)
        return read(cubin(source, target, root))[name]

    def walk(self, block: int | None = None, warp: int = 0, root: Path = ROOT) -> Walk:
        """A warp of one of the blocks; left out: one in the middle of a row."""
        launch = self.launch
        if block is None:
            block = min(3, launch.grid[0] - 1)
        return Walk(
            self.code(root), launch.arguments, launch.grid, launch.threads, (block, 0, 0), warp,
            arrays_of(self.step), cluster=launch.cluster > 1, parts=launch.splits,
        ).run()  # fmt: skip


def first(walk: Walk, *names: str) -> Event:
    return next(event for event in walk.events if event.name in names)


def tiles_of(walk: Walk, step: Step) -> int:
    """Tiles of this warp; of those that load K and V both count as one."""
    sides = Counter[int]()
    for at, size in walk.copied.items():
        sides[at >> ARRAY_BITS] += size
    keys = max((sides[side] for side in (1, 2)), default=0) // step.key_bytes
    return -(-keys // step.tile_keys)


def chain_of(walk: Walk, step: Step) -> Chain:
    """The serial chain of a block that streams keys and arrives last of its row."""
    start, end = first(walk, "LDGSTS"), first(walk, "PREEXIT")
    tiles = tiles_of(walk, step)
    arrival = next((e for e in walk.events if e.name == "ATOMG"), None)
    finish = (arrival.time if arrival else walk.time) - end.time
    return Chain(
        parts=walk.parts, tiles=tiles,
        trips_before=start.level, trips_behind=walk.level - end.level,
        head=start.time, tile=(end.time - start.time) / tiles,
        tile_instructions=(end.step - start.step) / tiles, finish=finish,
        merge=walk.time - arrival.time if arrival else 0,
    )  # fmt: skip


def lone_chain_of(walk: Walk) -> Chain:
    """The same of a kernel that streams no keys: one chain from start to end."""
    return Chain(1, 0, walk.level, 0, walk.time, 0.0, 0.0, 0, 0)


def executed(walk: Walk, *names: str) -> int:
    return sum(event.name in names for event in walk.events)


# --- what holds of any kernel -----------------------------------------------------------------


def accesses_before_the_wait(kernel: Kernel) -> list[Instruction]:
    """Accesses of global memory that some way reaches before it waits for the launch in front."""
    found = kernel.reached([0], lambda i: i.base == "ACQBULK")
    return [i for i in found if i.is_global]


def unfenced_arrivals(kernel: Kernel) -> list[str]:
    """Arrivals whose block's writes, or whose later reads, no fence orders."""
    found = []
    for n, i in enumerate(kernel.code):
        if i.base != "ATOMG":
            continue
        block = next(b for b in kernel.blocks if n in b)
        before = [kernel.code[m].base for m in range(block.start, n)]
        stores = [at for at, base in enumerate(before) if base in ("STG", "ST")]
        fences = [at for at, base in enumerate(before) if base in FENCES]
        if not fences or (stores and stores[-1] > fences[-1]):
            found.append(f"{i.address:#x}: no fence between the block's writes and its arrival")
        behind = kernel.reached([n + 1], lambda i: i.base in ACQUIRES)
        if any(i.is_load or i.is_copy for i in behind):
            found.append(f"{i.address:#x}: nothing makes what it reads newer than its arrival")
    return found


def heavy_fences(kernel: Kernel) -> list[str]:
    """Fences that are sequentially consistent, which costs more than an arrival needs."""
    return [f"{i.address:#x} {i.name}" for i in kernel.code if i.name.startswith("MEMBAR.SC")]


def serial_merges(kernel: Kernel) -> list[Loop]:
    """Loops that read what other blocks wrote, one trip to L2 after another."""
    return [loop for loop in loops_of(kernel) if loop.strong and loop.serial]


def merge_copies(kernel: Kernel) -> list[Loop]:
    """Loops that only copy: the merge copies what other blocks wrote, states and sums."""
    return [loop for loop in loops_of(kernel) if loop.copies and not loop.loads]


def touched_too_early(kernel: Kernel) -> tuple[int, list[str]]:
    """Loads, and those whose register is used before their scoreboard is waited for.

    Were a control word misread, some would be. Under the opposite predicate there was no load.
    """
    loads, wrong = 0, []
    for block in kernel.blocks:
        for n in block:
            load = kernel.code[n]
            if not load.is_load or load.writes > 5 or not load.operands[0].startswith("R"):
                continue
            register = re.compile(rf"\b{load.operands[0].split('.')[0]}\b")
            for m in range(n + 1, block.stop):
                i = kernel.code[m]
                opposite = {load.guard, i.guard} in ({g, f"!{g}"} for g in (load.guard, i.guard))
                if i.waits >> load.writes & 1:
                    loads += 1
                    break
                if not opposite and register.search(" ".join(i.operands)):
                    loads += 1
                    wrong.append(f"{load.address:#x} {load.name}, used at {i.address:#x}")
                    break
    return loads, wrong
