"""The machine code of a kernel: control words, blocks, loops, and the loads in flight.

From Volta on the upper half of an instruction of 128 bits says, from bit 41, what the hardware does
not check by itself: the cycles until the next instruction (4 bits), one of six scoreboards that its
result is booked on (from bit 46, 3 bits), one for its operands (3), and a mask of those that it
waits for (6). A load is in flight from its issue to the first instruction that waits for its
scoreboard, so counts of loads in flight are exact, whatever the registers are called.
"""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
UPPER_HALF = re.compile(r"/\* 0x([0-9a-f]{16}) \*/\s*$")
KERNEL = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
LABEL = re.compile(r"^(\.L_x_\d+|\$?[\w$]+):")
TARGET = re.compile(r"\.L_x_\d+")

LOADS = ("LDG", "LD", "ATOMG", "ATOM")  # from other memory than the block's own, into registers
COPIES = ("LDGSTS", "UBLKCP")  # into shared memory
STORES = ("STG", "ST", "RED", "REDG")
LEAVES = ("BRA", "BRX", "EXIT", "RET")
FENCES = ("MEMBAR",)
ACQUIRES = ("MEMBAR", "CCTL")


class Instruction(NamedTuple):
    address: int
    guard: str  # "", "P0", "!UP1"
    name: str
    operands: tuple[str, ...]
    stall: int
    writes: int
    reads: int
    waits: int

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_load(self) -> bool:
        return self.base in LOADS

    @property
    def is_copy(self) -> bool:
        return self.base in COPIES

    @property
    def is_global(self) -> bool:
        """Whether it touches memory that another launch may write."""
        return self.base in (*LOADS, *COPIES, *STORES)


def operands_of(text: str) -> tuple[str, ...]:
    """Split at the commas outside of brackets."""
    parts = re.split(r",(?![^\[]*\])(?![^(]*\))", text)
    return tuple(p.strip().removesuffix(".reuse") for p in parts if p.strip())


@dataclass(frozen=True)
class Kernel:
    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]  # addresses
    tables: bytes = b""  # constant bank 2, where switches keep their targets

    @cached_property
    def index(self) -> dict[int, int]:
        """Of each address."""
        return {i.address: n for n, i in enumerate(self.code)}

    @cached_property
    def blocks(self) -> list[range]:
        """Runs of instructions that are entered at their start alone."""
        starts = {0} | {self.index[a] for a in self.labels.values() if a in self.index}
        starts |= {n + 1 for n, i in enumerate(self.code[:-1]) if i.base in LEAVES}
        edges = [*sorted(starts), len(self.code)]
        return [range(a, b) for a, b in pairwise(edges)]

    @cached_property
    def following(self) -> list[list[int]]:
        """The blocks that may come behind each block; a call comes back, so it is not followed."""
        of = {block.start: b for b, block in enumerate(self.blocks)}
        found = []
        for b, block in enumerate(self.blocks):
            last = self.code[block[-1]]
            names = TARGET.findall(" ".join(last.operands)) if last.base in ("BRA", "BRX") else []
            goes = [of[self.index[self.labels[name]]] for name in names]
            always = not last.guard and not any(
                re.match(r"!?U?P\d", operand) for operand in last.operands
            )
            always = always and (last.base in LEAVES) and last.name != "BRA.DIV"
            if not always and b + 1 < len(self.blocks):
                goes.append(b + 1)
            found.append(goes)
        return found

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """{block that is entered first: all blocks}, the natural loops; one for each entry."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for b, goes in enumerate(self.following):
            for to in goes:
                before[to].append(b)
        reached, todo = {0}, [0]
        while todo:
            for to in self.following[todo.pop()]:
                if to not in reached:
                    reached.add(to)
                    todo.append(to)
        dominators = {b: set(reached) for b in reached} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for b in sorted(reached - {0}):
                over = [dominators[p] for p in before[b] if p in reached]
                new = {b} | set.intersection(*over)
                changed |= new != dominators[b]
                dominators[b] = new
        found: dict[int, set[int]] = {}
        for b in reached:
            for head in set(self.following[b]) & dominators[b]:
                body, todo = found.setdefault(head, {head}), [b]
                while todo:
                    if (one := todo.pop()) not in body:
                        body.add(one)
                        todo += [p for p in before[one] if p in reached]
        return found

    def reached(
        self, starts: Iterable[int], stop: Callable[[Instruction], bool]
    ) -> Iterable[Instruction]:
        """What may run behind the instructions at `starts` before one at which `stop` is true."""
        of = {n: b for b, block in enumerate(self.blocks) for n in block}
        todo, seen = [s for s in starts], set()
        while todo:
            n = todo.pop()
            if n in seen or n >= len(self.code):
                continue
            seen.add(n)
            if stop(self.code[n]):
                continue
            yield self.code[n]
            block = self.blocks[of[n]]
            todo += (
                [n + 1] if n + 1 in block else [self.blocks[b][0] for b in self.following[of[n]]]
            )


class Loop(NamedTuple):
    """A loop that reads global memory. What an inner loop holds counts there alone."""

    depth: int
    instructions: int
    loads: int
    in_flight: int  # the most loads that are out at once
    copies: int
    strong: bool  # its loads bypass L1, to see what other blocks wrote

    @property
    def serial(self) -> bool:
        """Whether every load waits for the one before."""
        return self.loads > 0 and self.in_flight == 1


def loops_of(kernel: Kernel) -> list[Loop]:
    found = []
    for head, body in sorted(kernel.loops.items()):
        inner = [other for h, other in kernel.loops.items() if h != head and other < body]
        own = body - set().union(*inner)
        code = [kernel.code[n] for b in own for n in kernel.blocks[b]]
        loads = [i for i in code if i.is_load and not i.base.startswith("ATOM")]  # no arrivals
        copies = sum(i.is_copy for i in code)
        if loads or copies:
            depth = sum(body < other for other in kernel.loops.values())
            flying = in_flight(kernel, own, head)
            strong = any("STRONG" in i.name for i in loads)
            found.append(Loop(depth, len(code), len(loads), flying, copies, strong))
    return found


def in_flight(kernel: Kernel, blocks: set[int], head: int) -> int:
    """The most loads out at once on any path through these blocks, entered with none out."""
    entered: dict[int, tuple[int, ...]] = {head: (0,) * 6}
    most, todo = 0, [head]
    while todo:
        b = todo.pop()
        out = list(entered[b])
        for n in kernel.blocks[b]:
            i = kernel.code[n]
            out = [0 if i.waits >> s & 1 else count for s, count in enumerate(out)]
            if i.is_load and i.writes < 6:
                out[i.writes] = min(out[i.writes] + 1, 64)
                most = max(most, sum(out))
        for to in kernel.following[b]:
            if to in blocks:
                new = tuple(map(max, entered.get(to, (0,) * 6), out))
                if new != entered.get(to):
                    entered[to] = new
                    todo.append(to)
    return most


def parse(name: str, text: str, table: bytes = b"") -> Kernel:
    """A kernel of what nvdisasm lists: an instruction takes two lines, its halves at their ends."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found = None
    for line in text.splitlines():
        if match := LABEL.match(line):
            waiting.append(match[1])
        elif match := LINE.match(line):
            found = int(match[1], 16), match[2] or "", match[3], operands_of(match[4])
            labels.update(dict.fromkeys(waiting, found[0]))
            waiting = []
        elif found and (match := UPPER_HALF.search(line)):
            bits = int(match[1], 16) >> 41
            code.append(
                Instruction(*found, bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)
            )
            found = None
    return Kernel(name, tuple(code), labels, table)


def jump_tables(cubin: bytes) -> dict[str, bytes]:
    """{kernel: its constant bank 2}, from the sections of an ELF file."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", cubin, at + n * size) for n in range(count)]
    found = {}
    for name, *_, start, length in rows:
        title = cubin[rows[names][4] + name :].partition(b"\0")[0].decode()
        found[title.removeprefix(".nv.constant2.")] = cubin[start : start + length]
    return found


@cache
def disassembler() -> str | None:
    """nvdisasm, on PATH or as Triton brings it."""
    triton = importlib.util.find_spec("triton")
    places = triton.submodule_search_locations if triton else None
    folders = [os.environ["PATH"], *(f"{place}/backends/nvidia/bin" for place in places or ())]
    return shutil.which("nvdisasm", path=os.pathsep.join(folders))


@cache
def read(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a cubin, by name."""
    tool = disassembler()
    assert tool is not None, "no nvdisasm: install Triton or the CUDA toolkit"
    command = [tool, "-c", "-hex", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tables = jump_tables(cubin.read_bytes())
    _, *sections = KERNEL.split(text)
    pairs = zip(sections[::2], sections[1::2], strict=True)
    return {name: parse(name, body, tables.get(name, b"")) for name, body in pairs}
