"""The serial structure of the Triton kernels on sm_90, as JSON.

A process of its own, without the interpreter: `cd tests; python -m machine_code.triton_kernels`.
For each kernel of a step, what tests/test_triton_latency.py has limits for.
"""

import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="visionpulse-triton-")
os.environ.pop("TRITON_INTERPRET", None)

from .sass import Kernel, loops_of, read

STEPS = {"dense": {}, "decode": {"score": "prob", "output": "pruned"}, "follow": {}}
CACHES = {"": False, ", 8 bits": True}


def barriers_behind_arrival(kernel: Kernel) -> tuple[int, int]:
    """Barriers in the code behind the last arrival, and those of them that lie in loops."""
    arrivals = [n for n, i in enumerate(kernel.code) if i.base == "ATOMG"]
    if not arrivals:
        return 0, 0
    behind = kernel.reached([arrivals[-1] + 1], lambda i: False)
    found = {i.address for i in behind if i.base == "BAR"}
    blocks = set().union(*kernel.loops.values())
    looped = {kernel.code[n].address for b in blocks for n in kernel.blocks[b]}
    return len(found), len(found & looped)


def facts() -> dict[str, dict[str, int]]:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "triton"))
    import aot  # type: ignore[import-not-found]
    import launches  # type: ignore[import-not-found]

    found = {}
    for (step, options), (cache, float8) in product(STEPS.items(), CACHES.items()):
        with launches.recorded("sm_90") as recorded:
            getattr(launches, step)(launches.Shape(float8=float8), **options)
        for one in recorded:
            compiled = aot.build(one.kernel, one.arguments, one.options, "sm_90")
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(compiled.asm["cubin"])
                (kernel,) = (k for k in read(cubin).values() if k.code)
            loops = loops_of(kernel)
            barriers, looped = barriers_behind_arrival(kernel)
            found[f"{step} {one.kernel.__name__.strip('_')}{cache}"] = {
                "serial loops": sum(loop.serial and not loop.copies for loop in loops),
                "copying loops": sum(loop.copies > 0 for loop in loops),
                "instructions": max(loop.instructions for loop in loops if loop.copies),
                "barriers": barriers,
                "barriers in loops": looped,
            }
    return found


if __name__ == "__main__":
    print(json.dumps(facts()))
