"""The conversions of float8_e4m3fn that are written in PTX, run instruction by instruction.

Run by `interpret.py`: no machine here executes them, and Triton's interpreter has no PTX.
"""

import re

import numpy as np
import pytest
import torch
from visionpulse._triton import _float8

EVEN, ODD = (slice(i, None, 2) for i in (0, 1))
CONVERSIONS = {
    "even-by-chip": (_float8._EVEN_BY_CHIP, EVEN),
    "odd-by-chip": (_float8._ODD_BY_CHIP, ODD),
    "even-by-integers": (_float8._EVEN_BY_INTEGERS, EVEN),
    "odd-by-integers": (_float8._ODD_BY_INTEGERS, ODD),
}


def permuted(a, b, selector):
    """PRMT: each byte of the result is one of eight, or its sign eight times."""
    source = np.stack([a, b], axis=-1).view(np.uint8)
    picked = []
    for nibble in (selector >> 4 * i & 15 for i in range(4)):
        byte = source[..., nibble & 7]
        picked.append(np.where(byte & 128, 255, 0).astype(np.uint8) if nibble & 8 else byte)
    return np.stack(picked, axis=-1).view(np.uint32)[..., 0]


def fused(a, b, c):
    """FMA of two float16; the factor is a power of two, so that only its sum rounds."""
    halves = [x[..., None].view(np.float16).astype(np.float32) for x in (a, b, c)]
    return (halves[0] * halves[1] + halves[2]).astype(np.float16).view(np.uint32)[..., 0]


def converted(two):
    """Two numbers of e4m3 in 16 bits as two float16."""
    numbers = torch.from_numpy(two[..., None].astype(np.uint16).view(np.uint8).copy())
    wide = numbers.view(torch.float8_e4m3fn).to(torch.float16)
    return wide.numpy().view(np.uint32)[..., 0]


OPERATIONS = {
    "shl.b32": lambda a, n: a << n,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b,
    "prmt.b32": permuted,
    "fma.rn.f16x2": fused,
    "cvt.rn.f16x2.e4m3x2": converted,
}


def run(text, pairs):
    """Registers are arrays of 32 bits, or of 16 in as many."""
    registers = {"$1": pairs}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in text.strip("{} \n;").split(";\n"):
        name, rest = line.split(" ", 1)
        if name == ".reg":
            continue
        if name == "mov.b32" and rest.startswith("{"):
            low, high, source = re.fullmatch(r"\{(\w+), (\w+)\}, (\w+)", rest).groups()
            registers[low], registers[high] = value(source) & 0xFFFF, value(source) >> 16
            continue
        to, *operands = rest.split(", ")
        if name == "mov.b32":
            registers[to] = np.broadcast_to(value(*operands), pairs.shape).copy()
        elif name == "prmt.b32":
            a, b = (np.broadcast_to(value(x), pairs.shape) for x in operands[:2])
            registers[to] = permuted(a, b, int(operands[2], 0))
        else:
            registers[to] = OPERATIONS[name](*map(value, operands))
    return registers["$0"]


@pytest.mark.parametrize("name", CONVERSIONS)
def test_every_byte_at_every_place_becomes_its_number(name):
    text, columns = CONVERSIONS[name]
    some = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x7E, 0x35, 0xC8], np.uint8)
    byte, other = (x.ravel() for x in np.meshgrid(np.arange(256, dtype=np.uint8), some))
    for place in range(4):
        four = np.repeat(other[:, None], 4, axis=1)
        four[:, place] = byte
        found = run(text.value, four.view(np.uint32)[:, 0])
        found = torch.from_numpy(found[:, None].view(np.float16).copy())
        wanted = torch.from_numpy(four[:, columns].copy()).view(torch.float8_e4m3fn)
        torch.testing.assert_close(
            found, wanted.to(torch.float16), rtol=0.0, atol=0.0, equal_nan=True
        )
