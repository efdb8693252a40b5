"""The machine code of every launch on every target: no spill, in its table, wide loads, no TF32.

Run by `compile.py` in a process without the interpreter and without a GPU. All seven targets are
assembled to the end, none is skipped: the wheel of Triton has ptxas for the six of NVIDIA, whose
machine code says what it uses and how it is fenced, while PTX says the width of each load and the
kind of each dot; and the linker for AMD, whose compiler reports registers and spills.
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

# At most so many registers a thread and bytes of shared memory, at least so many 128-bit loads,
# per launch, kernel and target, with the pinned Triton. `compile.py --write` makes it.
LIMITS = json.loads(Path(__file__).with_name("limits.json").read_text())
PINNED = triton.__version__.startswith("3.6.")
# Another Triton schedules otherwise: registers and shared memory are its own, within what the chip
# has, and of the loads it may peel or merge a few; were they narrow, hardly one would be left.
ANY = 512, 1 << 20
NEARLY_ALL = 3 / 4
# What a block may have on the chip: registers a thread, bytes of shared memory.
CHIP = {
    "sm_80": (255, 163 << 10),
    "sm_86": (255, 99 << 10),
    "sm_89": (255, 99 << 10),
    "sm_90": (255, 227 << 10),
    "sm_100": (255, 227 << 10),
    "sm_120": (255, 99 << 10),
    "gfx942": (512, 64 << 10),
}
Shape = launches.Shape
PRUNED, DENSE = ({"score": "prob", "output": output} for output in ("pruned", "dense"))
# more slots than 32 bits count elements of
FAR = 2**22

# What is compiled: each kernel in each dtype, then each constant that changes the code, where it
# weighs most. (name: shape, launcher, its options, and the only kernel to look at, if so)
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
    # logits summed over a group, ranked without an exp: the code of "logit" in both its forms
    "dense-anchor-logit": (Shape(), launches.decode, {"score": "logit", "output": "dense"}),
    # given scores
    "choose-long": (Shape(capacity=131072), launches.choose, {}),
    # the scan of a pruned anchor too: K alone, with what it keeps of every logit
    "score-paged-spans": (Shape(page=16, spans=300), launches.score, {}),
    "anchor-widest": (Shape(**WIDEST), launches.decode, DENSE, "_scan_kernel"),
    "anchor-widest-float32": (
        Shape(**WIDEST, dtype=torch.float32), launches.decode, DENSE, "_scan_kernel",
    ),
    "pruned-widest": (Shape(**WIDEST), launches.decode, PRUNED, "_attend_kernel"),
    "follow-widest": (Shape(**WIDEST), launches.follow, {}),
    "follow-widest-float32": (Shape(**WIDEST, dtype=torch.float32), launches.follow, {}),
    "follow-g7-d80": (Shape(group=7, head_dim=80), launches.follow, {}),
    "dense-paged-softcap": (Shape(page=16, softcap=30.0), launches.dense, {}),
    "rank-paged-spans": (Shape(page=16, spans=300), launches.decode, PRUNED, "_rank_kernel"),
    "follow-far": (Shape(capacity=FAR, cut=False), launches.follow, {}),
}  # fmt: skip
ALL = PLAIN | SPECIAL


@functools.cache
def kernels_of(name, target):
    """Report of each kernel that a launch compiles, by its own name."""
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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_machine_code(name, target):
    most_registers, most_shared = CHIP[target]
    for kernel, found in kernels_of(name, target).items():
        where = f"{kernel} of {name} on {target}"
        assert not found.tf32, f"{where}: TF32 in the machine code"
        registers, shared, wide_loads = LIMITS[name][kernel][target]
        if not PINNED:
            (registers, shared), wide_loads = ANY, math.ceil(wide_loads * NEARLY_ALL)
        few = f"{where}: {found.wide_loads} of {wide_loads} 128-bit loads"
        assert found.wide_loads >= wide_loads, few
        assert found.fenced, f"{where}: the arrival count is not fenced on both sides"
        assert found.spills == 0, f"{where}: {found.spills} spills, bytes of stack or local memory"
        assert found.registers <= min(registers, most_registers), f"{where}: {found.registers}"
        assert found.shared <= min(shared, most_shared), f"{where}: {found.shared} bytes shared"
