"""Compile a kernel ahead of time, as the runtime would, and read what the machine code says.

The launchers themselves say what is compiled: a kernel is replaced by a recorder, the launcher is
called with meta tensors, and the arguments it would launch with give the signature.
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
# Chips that Triton makes the same PTX for but its name, which a test holds to: only the last step,
# from PTX to machine code, is taken for each.
TWINS = {"sm_89": "sm_86"}
_POINTERS = {
    "float32": "*fp32",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "int64": "*i64",
    "int32": "*i32",
    "int8": "*i8",
}


class Report(NamedTuple):
    """What the machine code of one kernel uses."""

    registers: int
    shared: int  # bytes
    spills: int  # bytes of stack and local memory, spilled registers
    wide_loads: int  # 128-bit loads from global memory
    tf32: bool
    fenced: bool  # stores are out before each arrival, and stale lines gone after it


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
    """A file with what ptxas makes."""
    path = folder / "kernel.cubin"
    if target in TWINS:
        ptx = folder / "kernel.ptx"
        ptx.write_text(renamed(compiled.asm["ptx"], target))
        _tool("ptxas", f"--gpu-name={target}", ptx, "-o", path)
    else:
        path.write_bytes(compiled.asm["cubin"])
    return path


def renamed(ptx, target):
    """PTX of a chip's twin as that of the chip."""
    return ptx.replace(f".target {TWINS[target]}", f".target {target}")


def _is_fenced(cubin):
    """Whether no other access to global memory stands between an arrival and its fences."""
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
        # what becomes of it is the same in all forms of a kernel, and to disassemble takes long
        if arrives and where not in _FENCED:
            _FENCED[where] = _is_fenced(cubin)
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    # ptxas keeps what PTX says of the width of a load
    wide = re.findall(r"\bld\.global\S*(?:\.v4\.\w32|\.v2\.\w64)\b", ptx)
    wide += re.findall(r"\bcp\.async\.cg\b.*\], 0x10\b", ptx)
    # static memory is the system's own; the kernel's is dynamic
    return Report(
        registers=int(found["REG"]),
        shared=compiled.metadata.shared,
        spills=int(found["STACK"]) + int(found["LOCAL"]),
        wide_loads=len(wide),
        tf32="tf32" in ptx,
        fenced=not arrives or (ordered and _FENCED[where]),
    )


def _amd(_kernel, compiled, _target):
    code = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))

    # scalar registers spill into lanes of vector registers, which costs no memory
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code))
    # per arrival: write back before, invalidate after
    arrivals = len(re.findall(r"global_atomic_add\b.*\b(?:sc0|glc)\b", code))
    fenced = min(len(re.findall(word, code)) for word in ("buffer_wbl2", "buffer_inv")) >= arrivals
    return Report(
        number("vgpr_count"), compiled.metadata.shared, spills, wide, "xf32" in code, fenced
    )


_BUILT, _REPORTS = {}, {}


def report(kernel, arguments, options, target):
    """Compile and read, once for each difference that the compiler sees."""
    types, constants, _ = signature_of(kernel, arguments)
    form = kernel.__name__, str(types), str(constants), str(options)
    if (form, target) not in _REPORTS:
        _REPORTS[form, target] = _report(form, kernel, arguments, options, target)
    return _REPORTS[form, target]


def _report(form, kernel, arguments, options, target):
    of = TWINS.get(target, target)
    if (form, of) not in _BUILT:
        _BUILT[form, of] = build(kernel, arguments, options, of)
    compiled = _BUILT[form, of]
    return (_nvidia if "cubin" in compiled.asm else _amd)(kernel.__name__, compiled, target)
