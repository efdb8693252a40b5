"""Compile a kernel ahead of time, as the runtime would, and read what its machine code uses.

The launchers themselves say what is compiled: a recorder takes the place of a kernel, the launcher
is called with meta tensors, and its arguments give the signature.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    **{f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Chips whose PTX differs only by the chip's name, as a test checks: the last step alone, from PTX
# to machine code, is done for each. Not of a cache of float8_e4m3fn, which sm_89 alone converts.
TWINS = {"sm_89": "sm_86"}
_POINTERS = {
    "float32": "*fp32",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "int64": "*i64",
    "int32": "*i32",
    "int8": "*i8",
    "uint8": "*u8",
    "uint16": "*u16",
}


class Report(NamedTuple):
    """What the machine code of one kernel uses."""

    registers: int
    shared: int  # bytes
    spills: int  # bytes of stack and local memory, spilled registers
    wide_loads: int  # 128-bit loads from global memory
    conversions: int  # of two numbers of float8_e4m3fn at a time, by the chip's own instruction
    tf32: bool
    fenced: bool  # stores are flushed before each arrival, stale lines dropped after it


def signature_of(kernel, arguments):
    """Types, constants and 16-byte facts of a launch, as Triton's own launcher finds them."""
    types, constants, aligned = {}, {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif hasattr(value, "dtype"):
            types[parameter.name] = _POINTERS[str(value.dtype).removeprefix("torch.")]
            aligned[(parameter.num,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
    return types, constants, aligned


def build(kernel, arguments, options, target):
    types, constants, aligned = signature_of(kernel, arguments)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


def _tool(name, *arguments):
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _machine_code(compiled, target, folder):
    """The cubin, as a file."""
    path = folder / "kernel.cubin"
    if f".target {target}" not in compiled.asm["ptx"]:
        ptx = folder / "kernel.ptx"
        ptx.write_text(renamed(compiled.asm["ptx"], target))
        _tool("ptxas", f"--gpu-name={target}", ptx, "-o", path)
    else:
        path.write_bytes(compiled.asm["cubin"])
    return path


def renamed(ptx, target):
    """PTX of a chip's twin, renamed for the chip."""
    return ptx.replace(f".target {TWINS[target]}", f".target {target}")


def _is_fenced(cubin):
    """Whether no other access to global memory lies between an arrival and its fences."""
    code = _tool("nvdisasm", "-c", cubin)
    access = r"(?:(?!\b(?:LDG|LDGSTS|STG|ATOMG|RED)\b)[\s\S])*?"
    arrival = r"\bATOMG\.E\.ADD\.STRONG\.GPU"
    arrivals = len(re.findall(arrival, code))
    fenced = re.findall(rf"MEMBAR\.\S*GPU{access}{arrival}{access}CCTL\.IVALL", code)
    return len(fenced) == arrivals > 0


_FENCED = {}


def _nvidia(kernel, compiled, target):
    ptx, where = compiled.asm["ptx"], (kernel, target)
    arrives = re.search(r"\batom\.\S*\.add\b", ptx) is not None
    ordered = "acq_rel" in ptx
    with tempfile.TemporaryDirectory() as folder:
        cubin = _machine_code(compiled, target, Path(folder))
        usage = _tool("cuobjdump", "-res-usage", cubin)
        # the same in all variants of a kernel, and disassembly is slow
        if arrives and where not in _FENCED:
            _FENCED[where] = _is_fenced(cubin)
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    # ptxas keeps the width of a load that PTX says
    wide = re.findall(r"\bld\.global\S*(?:\.v4\.\w32|\.v2\.\w64)\b", ptx)
    wide += re.findall(r"\bcp\.async\.cg\b.*\], 0x10\b", ptx)
    # static shared memory is the system's; the kernel's own is dynamic
    return Report(
        registers=int(found["REG"]),
        shared=compiled.metadata.shared,
        spills=int(found["STACK"]) + int(found["LOCAL"]),
        wide_loads=len(wide),
        conversions=len(re.findall(r"\bcvt\.rn\.f16x2\.e4m3x2\b", ptx)),
        tf32="tf32" in ptx,
        fenced=not arrives or (ordered and _FENCED[where]),
    )


def _amd(_kernel, compiled, _target):
    code = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))

    # a scalar register spills into a lane of a vector register, which needs no memory
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code))
    # per arrival: write back before, invalidate after
    arrivals = len(re.findall(r"global_atomic_add\b.*\b(?:sc0|glc)\b", code))
    fenced = min(len(re.findall(word, code)) for word in ("buffer_wbl2", "buffer_inv")) >= arrivals
    return Report(
        number("vgpr_count"), compiled.metadata.shared, spills, wide, 0, "xf32" in code, fenced
    )


_BUILT, _REPORTS = {}, {}


def report(kernel, arguments, options, target):
    """Compile and read, once per variant that the compiler sees."""
    types, constants, _ = signature_of(kernel, arguments)
    variant = kernel.__name__, str(types), str(constants), str(options)
    if (variant, target) not in _REPORTS:
        _REPORTS[variant, target] = _report(variant, kernel, arguments, options, target)
    return _REPORTS[variant, target]


def _report(variant, kernel, arguments, options, target):
    of = target if arguments.get("FLOAT8") else TWINS.get(target, target)
    if (variant, of) not in _BUILT:
        _BUILT[variant, of] = build(kernel, arguments, options, of)
    compiled = _BUILT[variant, of]
    return (_nvidia if "cubin" in compiled.asm else _amd)(kernel.__name__, compiled, target)
