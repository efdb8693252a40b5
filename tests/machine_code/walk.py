"""One warp's way through a kernel, with the arguments of a launch: trips to memory, and its time.

A trip: walking in order, the level grows by one when an instruction waits for a load that was
issued at the present level. Loads that are out together are one trip. Time is that of a warp that
is alone: stalls, and waits for scoreboards, each booked with the latency of what it waits for.

Of the other warps of its block it is assumed that they ask for the partial sums of a row beside it,
16 bytes a lane, which come from L2 one after the other.

Not seen: the issue slots and other bandwidth that warps take; hits and misses, as each array has
one latency; bank conflicts; what a fence waits for. A branch on something unknown is not
taken, and counted; a vote on something unknown says no.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .lanes import LANES, WORD, Lanes, Value, same
from .operations import compute
from .sass import TARGET, Instruction, Kernel

# Cycles at 1.83 GHz, assumed for an H200. An L2 hit takes 222 to 339 cycles on an L40, by
# multiprocessor (arXiv 2606.22588), 236 on an RTX 2070, where shared memory takes 23 and DRAM 1000
# to 1200 (github.com/sjfeng1999/gpu-arch-microbenchmark). The others are of their order.
L2, DRAM = 290, 1190
L2_BYTES = 64  # that a multiprocessor takes from L2 in a cycle
LATENCY = {
    "LDS": 30, "LDSM": 33, "STS": 20, "SHFL": 25, "MUFU": 22, "S2R": 25, "S2UR": 25, "LDC": 25,
    "I2F": 22, "F2I": 22, "POPC": 20, "ATOMG": 600, "ATOMS": 60, "MEMBAR": 700, "BAR": 25,
    "UCGABAR_WAIT": 400, "LD": 220, "VOTE": 15, "CCTL": 100, "MOVM": 33, "STG": 20,
}  # fmt: skip
WAITS = ("BAR", "MEMBAR", "UCGABAR_WAIT", "CCTL")  # which hold the warp itself
EVENTS = (*WAITS, "ACQBULK", "PREEXIT", "ATOMG", "LDGSTS", "UBLKCP", "STG", "EXIT")
SILENT = {
    "NOP", "ERRBAR", "CGAERRBAR", "WARPSYNC", "YIELD", "LDGDEPBAR", "DEPBAR", "ENDCOLLECTIVE",
    "UCGABAR_ARV", "FENCE", "RED", "REDG", *WAITS, "ACQBULK", "PREEXIT", "STG", "ST", "BREAK",
}  # fmt: skip
ARRAY_BITS = 36  # array n of a launch lies at n << 36


class Array(NamedTuple):
    name: str
    latency: int
    words: Callable[[int], int] | None = None  # its 32-bit words, where they are known


@dataclass
class Event:
    name: str
    step: int  # instructions before it
    time: int  # cycles
    level: int


class Trip(NamedTuple):
    level: int
    time: int
    array: str


@dataclass
class Booked:
    """A scoreboard: when it is clear, and the level behind the loads on it."""

    time: int = 0
    level: int = 0
    array: str = ""


@dataclass
class Walk:
    kernel: Kernel
    arguments: bytes
    grid: tuple[int, int, int]
    threads: int
    block: tuple[int, int, int]
    warp: int
    arrays: Mapping[int, Array]
    cluster: bool = False
    limit: int = 200_000
    time: int = 0
    level: int = 0
    steps: int = 0
    trips: list[Trip] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    copied: Counter[int] = field(default_factory=Counter)  # bytes by address
    parts: int = 1  # blocks of a row and KV head
    unknown: Counter[int] = field(default_factory=Counter)  # branches, by address

    def __post_init__(self) -> None:
        lane = np.arange(LANES)
        bank = bytearray(0x210) + self.arguments
        for n, size in enumerate((self.threads, 1, 1, *self.grid)):
            bank[4 * n : 4 * n + 4] = size.to_bytes(4, "little")
        bank[0x140] = self.cluster  # which of two barriers a kernel takes that may be in a cluster
        special = {
            "SR_TID.X": lane + LANES * self.warp, "SR_LANEID": lane, "SR_CgaCtaId": 0,
            "SR_LTMASK": (1 << lane) - 1, "SR_CTAID_IN_CGA": 0,
        } | {f"SR_CTAID.{axis}": n for axis, n in zip("XYZ", self.block, strict=True)}  # fmt: skip
        self.lanes = Lanes({"0": bytes(bank), "2": self.kernel.tables}, special)
        self.shared = np.zeros(1 << 16, np.int64)
        self.is_known = np.zeros(1 << 16, bool)
        self.boards = [Booked() for _ in range(6)]
        self.group, self.groups = Booked(), list[Booked]()
        self.port = 0  # when L2 has sent all that was asked for

    # --- the way ---------------------------------------------------------------------------------

    def run(self) -> "Walk":
        code, jump = self.kernel.code, self.jump
        at = np.zeros(LANES, int)  # of each lane, the next instruction; -1: gone
        joins: dict[str, Any] = {}
        parked = np.full(LANES, False)
        while (at >= 0).any() and self.steps < self.limit:
            alive = (at >= 0) & ~parked
            if not alive.any():
                parked[:] = False
                continue
            n = int(at[alive].min())
            active = alive & (at == n)
            i = code[n]
            on, sure = self.guarded(i, active)
            self.steps += 1
            self.spend(i, bool(on.any()))
            at[active] = n + 1
            if i.base == "BSSY":
                joins[i.operands[0]] = active.copy()
            elif i.base == "BREAK" and on.any():
                joins[i.operands[-1]] = joins[i.operands[-1]] & ~on
            elif i.base == "BSYNC":
                parked |= active
                at[active] = n
                waiting = joins.get(i.operands[0], active) & (at >= 0)
                if (at[waiting] == n).all():
                    parked &= ~waiting
                    at[waiting] = n + 1
            elif i.base in ("BRA", "BRX", "CALL", "RET", "EXIT"):
                if i.name != "BRA.DIV" and on.any():
                    jump(i, on, sure, at)
            elif on.any():
                self.lanes.on = on
                self.perform(i, on)
                if not sure:
                    self.lanes.forget(i)
        return self

    def guarded(self, i: Instruction, active: Any) -> tuple[Any, bool]:
        """The lanes for which it counts, and whether that is known."""
        predicates = [i.guard] if i.guard else []
        if i.base == "BRA":
            predicates += [o for o in i.operands if re.match(r"!?U?P\d", o)]
        on, sure = active, True
        for predicate in predicates:
            value = self.lanes.read(predicate)
            sure = sure and bool(value.known[active].all())
            on = on & (value.bits != 0)
        return (on, True) if sure else (active, False)

    def jump(self, i: Instruction, on: Any, sure: bool, at: Any) -> None:
        index = self.kernel.index
        if not sure:
            self.unknown[i.address] += 1
            return
        if i.base == "EXIT":
            at[on] = -1
        elif i.base == "RET":
            at[on] = index[int(self.lanes.read(i.operands[0].split()[0]).unsigned[on][0])]
        elif i.base == "BRX":
            register, offset = i.operands[0].split()[:2]
            to, names = self.lanes.read(register), TARGET.findall(" ".join(i.operands))
            if to.known[on].all():
                at[on] = [
                    index[(int(x) + i.address + 16 + int(offset, 16)) & WORD] for x in to.bits[on]
                ]
            else:
                self.unknown[i.address] += 1
                at[on] = index[self.kernel.labels[names[0]]]
        else:
            name = re.search(r"\(([^)\s]+)\)", i.operands[-1])
            assert name is not None, i
            at[on] = index[self.kernel.labels[name[1]]]

    # --- time ------------------------------------------------------------------------------------

    def wait(self, board: Booked) -> None:
        self.time = max(self.time, board.time)
        if board.level > self.level:
            self.level = board.level
            self.trips.append(Trip(self.level, self.time, board.array))

    def spend(self, i: Instruction, runs: bool) -> None:
        for b in range(6):
            if i.waits >> b & 1:
                self.wait(self.boards[b])
                self.boards[b] = Booked()
        if i.name == "DEPBAR.LE" and len(i.operands) == 2:  # but for so many groups of copies
            stay = int(i.operands[1], 0)
            if len(self.groups) > stay:
                self.wait(self.groups[-1 - stay])
        issued, self.time = self.time, self.time + max(i.stall, 1)
        if i.base == "LDGDEPBAR":
            self.groups.append(self.group)
            self.group = Booked()
        if runs:
            self.time += LATENCY[i.base] if i.base in WAITS else 0
            self.book(i, issued, LATENCY.get(i.base, 20))
            if i.base in EVENTS:
                self.events.append(Event(i.base, self.steps, self.time, self.level))

    def book(self, i: Instruction, issued: int, latency: int, array: str = "") -> None:
        """On the scoreboards of its result and of its operands; with an array it is a trip."""
        for b, ready in ((i.writes, issued + latency), (i.reads, issued + 12)):
            if b < 6:
                board = self.boards[b]
                board.time = max(board.time, ready)
                if b == i.writes and array and self.level + 1 > board.level:
                    board.level, board.array = self.level + 1, array

    # --- memory ----------------------------------------------------------------------------------

    def perform(self, i: Instruction, on: Any) -> None:
        if i.base in ("LDG", "LD", "ATOMG", "ATOM"):
            self.load(i, on)
        elif i.base == "LDGSTS":
            self.copy(i, on)
        elif i.base in ("LDS", "STS"):
            self.use_shared(i, on)
        elif i.base not in SILENT:
            compute(self.lanes, i)

    def address(self, operand: str) -> Value:
        """Of `[R2+UR4+0x10]` or `desc[UR6][R2.64+0x10]`."""
        inside = operand[operand.rindex("[") + 1 :].rstrip("]")
        total, known = np.zeros(LANES, np.int64), np.full(LANES, True)
        for term in inside.replace("+-", "+~").split("+"):
            if term.startswith("~"):
                total = total - int(term[1:], 16)
            elif term[0] in "RU":
                value = self.lanes.read(term.split(".")[0], wide=".64" in term)
                total, known = total + value.bits, known & value.known
            else:
                total = total + int(term, 16)
        return Value(total, known)

    def array_at(self, address: Value, on: Any) -> Array:
        first = int(np.argmax(on))
        number = int(address.bits[first]) >> ARRAY_BITS
        return self.arrays.get(number if address.known[first] else -1, Array("?", L2))

    def load(self, i: Instruction, on: Any) -> None:
        register = i.operands[0]
        if i.base.startswith("ATOM"):
            # the block arrives last: the counter stands at the limit at which it wraps
            limit = int(self.lanes.read(i.operands[-1]).bits[int(np.argmax(on))])
            array = Array("arrival", LATENCY["ATOMG"], lambda _: limit)
            register, address = i.operands[1], same(0)
        else:
            address = self.address(i.operands[1])
            array = self.array_at(address, on)
            if i.base == "LD":  # of another block of the cluster
                array = Array("cluster", LATENCY["LD"])
        for n in range(4 if ".128" in i.name else 2 if ".64" in i.name else 1):
            known = on & address.known if array.words else np.full(LANES, False)
            offsets = (address.bits & (1 << ARRAY_BITS) - 1) // 4 + n
            words = [
                array.words(int(o)) if k and array.words else 0
                for o, k in zip(offsets, known, strict=True)
            ]
            self.lanes.write(register, Value(np.array(words, np.int64), known))
            if register != "RZ":
                register = f"R{int(register[1:].removesuffix('.64')) + 1}"
        issued = self.time - max(i.stall, 1)
        latency = array.latency + self.queue(i, issued, array, int(on.sum()))
        self.book(i, issued, latency, array.name)

    def queue(self, i: Instruction, issued: int, array: Array, lanes: int) -> int:
        """Cycles until L2 has sent what was asked for before, and this, to all warps."""
        if array.name != "scratch" or ".128" not in i.name:
            return 0
        sent = lanes * 16 * (self.threads // LANES) // L2_BYTES
        self.port = max(self.port, issued) + sent
        return self.port - issued

    def copy(self, i: Instruction, on: Any) -> None:
        address = self.address(i.operands[1])
        array = self.array_at(address, on)
        wanted = self.lanes.read(i.operands[2]).bits != 0 if len(i.operands) > 2 else on
        latency = array.latency + self.queue(i, self.time, array, int((on & wanted).sum()))
        self.group.time = max(self.group.time, self.time + latency)
        self.group.level, self.group.array = self.level + 1, f"copies of {array.name}"
        for at in address.bits[on & wanted & address.known]:
            self.copied[int(at)] += 16 if ".128" in i.name else 4
        cells = self.address(i.operands[0])
        for n in range(4):
            self.is_known[(cells.bits[on & cells.known] >> 2) + n & 0xFFFF] = False

    def use_shared(self, i: Instruction, on: Any) -> None:
        loads = i.base == "LDS"
        cells = self.address(i.operands[0 if not loads else 1])
        register = i.operands[0 if loads else 1]
        narrow = any(part in i.name for part in (".U8", ".U16", ".S8", ".S16"))
        for n in range(4 if ".128" in i.name else 2 if ".64" in i.name else 1):
            cell = (cells.bits >> 2) + n & 0xFFFF
            if loads:
                known = cells.known & self.is_known[cell] & (not narrow)
                self.lanes.write(register, Value(self.shared[cell], known))
            else:
                value, sure = self.lanes.read(register), on & cells.known
                self.shared[cell[sure]] = value.unsigned[sure]
                self.is_known[cell[sure]] = value.known[sure] & (not narrow)
            if register != "RZ":
                register = f"R{int(register[1:].removesuffix('.64')) + 1}"
