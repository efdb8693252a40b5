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
    spills: int  # instructions that touch local memory, bytes of stack, spilled registers
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


def _nvidia(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    spills = int(found["STACK"]) + int(found["LOCAL"]) + len(re.findall(r"\b(?:STL|LDL)\b", code))
    wide = len(re.findall(r"\b(?:LDG|LDGSTS)\b[^;]*\.128", code))
    # static memory is the system's own; the kernel's is dynamic
    shared = compiled.metadata.shared
    # no other access to global memory may stand between an arrival and its fences
    access = r"(?:(?!\b(?:LDG|LDGSTS|STG|ATOMG|RED)\b)[\s\S])*?"
    arrival = r"\bATOMG\.E\.ADD\.STRONG\.GPU"
    arrivals = len(re.findall(arrival, code))
    fenced = re.findall(rf"MEMBAR\.\S*GPU{access}{arrival}{access}CCTL\.IVALL", code)
    return Report(int(found["REG"]), shared, spills, wide, "TF32" in code, len(fenced) == arrivals)


def _amd(compiled):
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


_REPORTS = {}


def report(kernel, arguments, options, target):
    """Compile and read, once for each difference that the compiler sees."""
    types, constants, _ = signature_of(kernel, arguments)
    seen = (kernel.__name__, target, str(types), str(constants), str(options))
    if seen not in _REPORTS:
        _REPORTS[seen] = _report(kernel, arguments, options, target)
    return _REPORTS[seen]


def _report(kernel, arguments, options, target):
    compiled = build(kernel, arguments, options, target)
    return (_nvidia if "cubin" in compiled.asm else _amd)(compiled)
