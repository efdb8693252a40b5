"""The machine code of every launch on every target: no spill, in its table, wide loads, no TF32.

Run by `compile.py` in a process without the interpreter; it needs no GPU. All seven targets are
assembled to the end. Triton's wheel has ptxas for the six of NVIDIA: machine code says what a
kernel uses and how it is fenced, PTX the width of each load and the kind of each dot. It has the
linker for AMD, whose compiler reports registers and spills.
"""

import functools
import json
import math
from pathlib import Path

import aot
import launches
import pytest
import torch
import triton

# Per launch, kernel and target: most registers per thread, most bytes of shared memory, fewest
# 128-bit loads, with the pinned Triton. Written by `compile.py --write`.
LIMITS = json.loads(Path(__file__).with_name("limits.json").read_text())
PINNED = triton.__version__.startswith("3.6.")
# Another Triton schedules differently: registers and shared memory need only fit the chip, and it
# may peel or merge a few loads. Were the loads narrow, hardly one of 128 bits would be left.
ANY = 512, 1 << 20
NEARLY_ALL = 3 / 4
# What the chip allows: registers per thread, bytes of shared memory per block.
CHIP = {
    "sm_80": (255, 163 << 10),
    "sm_86": (255, 99 << 10),
    "sm_89": (255, 99 << 10),
    "sm_90": (255, 227 << 10),
    "sm_100": (255, 227 << 10),
    "sm_120": (255, 99 << 10),
    "gfx942": (512, 64 << 10),
}
# Chips that convert float8_e4m3fn by an instruction, two numbers at a time.
CONVERTING = ("sm_89", "sm_90", "sm_100", "sm_120")
Shape = launches.Shape
PRUNED, DENSE = ({"score": "prob", "output": output} for output in ("pruned", "dense"))
# so many slots that offsets in elements pass 32 bits
FAR = 2**22

# What is compiled: each kernel in each dtype, then each constant that changes the code, where it
# costs most. name: (shape, launcher, its options, the one kernel to check if not all)
PLAIN = {
    f"{name}-{str(dtype).removeprefix('torch.')}": (Shape(dtype=dtype), call, options)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for name, call, options in (
        ("dense", launches.dense, {}),
        ("pruned", launches.decode, PRUNED),
        ("dense-anchor", launches.decode, DENSE),
        ("follow", launches.follow, {}),
    )
}
WIDEST = {"group": 32, "head_dim": 256, "page": 16, "softcap": 30.0, "spans": 300}
SPECIAL = {
    # "logit": sums over a group are stored, and scored without an exp
    "dense-anchor-logit": (Shape(), launches.decode, {"score": "logit", "output": "dense"}),
    # select alone, from scores
    "select-long": (Shape(capacity=131072), launches.select, {}),
    # score of a pruned anchor too: K alone, every logit stored
    "score-paged-spans": (Shape(page=16, spans=300), launches.score, {}),
    "anchor-widest": (Shape(**WIDEST), launches.decode, DENSE, "_score_kernel"),
    "anchor-widest-float32": (
        Shape(**WIDEST, dtype=torch.float32), launches.decode, DENSE, "_score_kernel",
    ),
    "pruned-widest": (Shape(**WIDEST), launches.decode, PRUNED, "_attend_kernel"),
    "follow-widest": (Shape(**WIDEST), launches.follow, {}),
    "follow-widest-float32": (Shape(**WIDEST, dtype=torch.float32), launches.follow, {}),
    "follow-g7-d80": (Shape(group=7, head_dim=80), launches.follow, {}),
    "dense-paged-softcap": (Shape(page=16, softcap=30.0), launches.dense, {}),
    "select-paged-spans": (Shape(page=16, spans=300), launches.decode, PRUNED, "_select_kernel"),
    # 64 rows of a dot: 16 queries of 4 heads; the widest, and in several passes
    "dense-queries": (Shape(queries=16), launches.dense, {}),
    "dense-queries-float32": (
        Shape(queries=16, dtype=torch.float32), launches.dense, {},
    ),
    "dense-few-queries": (Shape(queries=4), launches.dense, {}),
    "pruned-queries": (Shape(queries=16), launches.decode, PRUNED),
    "dense-anchor-queries": (Shape(queries=16), launches.decode, DENSE, "_score_kernel"),
    "anchor-widest-queries": (
        Shape(**WIDEST, queries=3), launches.decode, DENSE, "_score_kernel",
    ),
    "anchor-widest-queries-float32": (
        Shape(**WIDEST, queries=3, dtype=torch.float32), launches.decode, DENSE, "_score_kernel",
    ),
    "follow-queries": (Shape(queries=16), launches.follow, {}),
    # K and V of a byte each, in pairs: loads of 16 bytes as ever
    "dense-float8": (Shape(float8=True), launches.dense, {}),
    "dense-float8-float32": (Shape(float8=True, dtype=torch.float32), launches.dense, {}),
    "pruned-float8": (Shape(float8=True), launches.decode, PRUNED),
    "dense-anchor-float8": (Shape(float8=True), launches.decode, DENSE, "_score_kernel"),
    "anchor-widest-float8": (Shape(**WIDEST, float8=True), launches.decode, DENSE, "_score_kernel"),
    "follow-float8": (Shape(float8=True), launches.follow, {}),
    "follow-widest-float8": (Shape(**WIDEST, float8=True), launches.follow, {}),
    "dense-queries-float8": (Shape(queries=16, float8=True), launches.dense, {}),
    "dense-float8-d16": (Shape(head_dim=16, float8=True), launches.dense, {}),
    "follow-far": (Shape(capacity=FAR, cut=False), launches.follow, {}),
}  # fmt: skip
ALL = PLAIN | SPECIAL


@functools.cache
def kernels_of(name, target):
    """Reports of the kernels that a launch compiles, by name."""
    shape, call, options, *only = ALL[name]
    with launches.recorded(target) as found:
        call(shape, **options)
    return {
        one.kernel.__name__: aot.report(one.kernel, one.arguments, one.options, target)
        for one in found
        if not only or one.kernel.__name__ in only
    }


@pytest.mark.parametrize("twin, of", aot.TWINS.items())
def test_twins_have_the_same_ptx(twin, of):
    with launches.recorded(twin) as found:
        launches.dense(Shape())
        launches.follow(Shape())
    for one in found:
        made = [aot.build(*one, target).asm["ptx"] for target in (of, twin)]
        assert aot.renamed(made[0], twin) == made[1]


def test_no_integer_argument_is_specialised():
    """A kernel made for N = 16 or B = 1 could add in another order than that for other sizes."""
    with launches.recorded("sm_90") as found:
        launches.decode(Shape(), **PRUNED)
    for one in found:
        for parameter in one.kernel.params:
            is_integer = type(one.arguments[parameter.name]) is int
            plain = parameter.is_constexpr or parameter.do_not_specialize
            assert plain or not is_integer, f"{parameter.name} of {one.kernel.__name__}"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_machine_code(name, target):
    most_registers, most_shared = CHIP[target]
    for kernel, found in kernels_of(name, target).items():
        where = f"{kernel} of {name} on {target}"
        assert not found.tf32, f"{where}: TF32 in the machine code"
        converts = kernel != "_select_kernel" and ALL[name][0].float8 and target in CONVERTING
        assert bool(found.conversions) == converts, f"{where}: {found.conversions} conversions"
        registers, shared, wide_loads = LIMITS[name][kernel][target]
        if not PINNED:
            (registers, shared), wide_loads = ANY, math.ceil(wide_loads * NEARLY_ALL)
        few = f"{where}: {found.wide_loads} of {wide_loads} 128-bit loads"
        assert found.wide_loads >= wide_loads, few
        assert found.fenced, f"{where}: the arrival count is not fenced on both sides"
        assert found.spills == 0, f"{where}: {found.spills} spills, bytes of stack or local memory"
        assert found.registers <= min(registers, most_registers), f"{where}: {found.registers}"
        assert found.shared <= min(shared, most_shared), f"{where}: {found.shared} bytes shared"
