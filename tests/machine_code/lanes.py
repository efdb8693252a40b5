"""The registers of a warp: what its 32 lanes hold, where that is known.

A value is 32 numbers and for each whether it is known. What depends on arguments and on the layout
of a row alone, such as addresses and trip counts, stays known; what depends on keys does not.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from .sass import Instruction

WORD = 0xFFFFFFFF
LANES = 32
REGISTER = re.compile(r"(?P<sign>[-~!]?)\|?(?P<name>U?[RP](?:\d+|Z|T))(?:\.\w+)?\|?$")
CONSTANT = re.compile(
    r"(?P<sign>[-~]?)\|?c\[0x(?P<bank>\w)\]\[(?P<register>U?R(?:\d+|Z))?\+?(?:0x(?P<at>\w+))?\]\|?$"
)
INTEGER = re.compile(r"-?(0x[0-9a-f]+|\d+)$")
PREDICATE = re.compile(r"!?U?P[\dT]$")


class Value(NamedTuple):
    bits: np.ndarray[Any, Any]  # int64; of 32 bits and unsigned, except where an operation widens
    known: np.ndarray[Any, Any]

    @property
    def signed(self) -> "np.ndarray[Any, Any]":
        return (self.bits & WORD).astype(np.uint32).view(np.int32).astype(np.int64)

    @property
    def unsigned(self) -> "np.ndarray[Any, Any]":
        return self.bits & WORD

    @property
    def real(self) -> "np.ndarray[Any, Any]":
        return (self.bits & WORD).astype(np.uint32).view(np.float32)


def same(number: int | bool, known: bool = True) -> Value:
    return Value(np.full(LANES, number, np.int64), np.full(LANES, known))


def bits_of(real: Any) -> np.ndarray[Any, Any]:
    return np.asarray(real, np.float32).view(np.uint32).astype(np.int64)


class Lanes:
    """The registers of a warp, its constants, and the arithmetic on both."""

    def __init__(self, banks: dict[str, bytes], special: dict[str, Any]) -> None:
        self.banks, self.special = banks, special
        self.registers: dict[str, Value] = {}
        self.fixed = {"RZ": same(0), "URZ": same(0), "PT": same(1), "UPT": same(1)}
        self.on = np.full(LANES, True)  # the lanes that the present instruction is for

    def register(self, name: str) -> Value:
        return self.fixed.get(name) or self.registers.get(name) or same(0, known=False)

    def read(self, operand: str, wide: bool = False) -> Value:
        """An integer or a predicate. Minus x is 2^32 - x, not reduced, so that sums carry right."""
        if match := REGISTER.match(operand):
            value = self.register(match["name"])
            if wide and not match["name"].endswith("Z"):
                high = self.register(following(match["name"]))
                value = Value(value.unsigned | high.unsigned << 32, value.known & high.known)
        elif match := CONSTANT.match(operand):
            value = self.constant(match, 8 if wide else 4)
        elif INTEGER.match(operand):
            number = int(operand, 0)
            return same(number if wide else number & WORD)
        else:
            return Value(bits_of(np.full(LANES, real_of(operand))), np.full(LANES, True))
        sign = match["sign"]
        if sign == "!":
            return Value(1 - value.bits, value.known)
        if sign:
            one = 1 << (0 if wide else 32)
            return Value((one if not wide and sign == "-" else one - 1) - value.bits, value.known)
        return value

    def real(self, operand: str) -> Value:
        """The same of a float32: minus turns its sign."""
        value = self.read(operand.strip("-|") if not INTEGER.match(operand) else operand)
        bits = value.bits & 0x7FFFFFFF if "|" in operand else value.bits
        negative = (operand.startswith("-") and "R" in operand) or operand.startswith("-c[")
        return Value(bits ^ (1 << 31 if negative else 0), value.known)

    def constant(self, match: re.Match[str], size: int) -> Value:
        at, known = int(match["at"] or "0", 16), True
        if match["register"]:
            offset = self.read(match["register"])
            known = bool(offset.known.any())
            at += int(offset.unsigned[offset.known][0]) if known else 0
        raw = self.banks.get(match["bank"], b"")[at : at + size]
        known = known and len(raw) == size
        return same(int.from_bytes(raw, "little", signed=size == 8) if known else 0, known)

    def write(self, name: str, value: Value, wide: bool = False) -> None:
        if name in self.fixed or not REGISTER.match(name):
            return
        name = name.removesuffix(".64")
        before = self.register(name)
        on = np.full(LANES, True) if name.startswith("U") else self.on
        lower = 1 if "P" in name else WORD
        bits = np.where(on, value.bits & lower, before.bits)
        self.registers[name] = Value(bits, np.where(on, value.known, before.known))
        if wide:
            self.write(following(name), Value(value.bits >> 32, value.known))

    def forget(self, i: Instruction) -> None:
        """What an instruction writes is unknown."""
        for operand in (
            i.operands[: 2 if PREDICATE.match(i.operands[0]) else 1] if i.operands else ()
        ):
            self.write(operand, same(0, known=False))


def following(name: str) -> str:
    bank = name.rstrip("0123456789")
    return f"{bank}{int(name[len(bank) :]) + 1}"


def real_of(text: str) -> float:
    return float(text.replace("QNAN", "nan").replace("+", "").lower())
