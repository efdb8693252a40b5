"""Compile every launch ahead of time: `python tests/triton/compile.py [pytest arguments]`.

A process of its own, without the interpreter; it needs no GPU. With `--write [names, targets]` it
writes limits.json instead of checking it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

# kernels that an earlier run compiled must not hide a change of the sources
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="visionpulse-triton-")
# a later release turns it off by default
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
os.environ.pop("TRITON_INTERPRET", None)

import process

HERE = Path(__file__).resolve().parent


def write(only):
    """Write limits.json: registers up to 16, shared memory up to 1 KiB, wide loads down to 4."""
    import aot
    import machine_code

    found = {name: machine_code.LIMITS.get(name, {}) for name in machine_code.ALL}
    targets = [target for target in aot.TARGETS if target in only] or aot.TARGETS
    for name in [name for name in found if name in only] or found:
        for target in targets:
            for kernel, report in machine_code.kernels_of(name, target).items():
                if report.spills:
                    print(f"{kernel} of {name} spills on {target}: {report}")
                found[name].setdefault(kernel, {})[target] = [
                    -(-report.registers // 16) * 16,
                    -(-report.shared // 1024) * 1024,
                    report.wide_loads // 4 * 4,
                ]
    lines = (f' "{name}": {json.dumps(kernels)}' for name, kernels in found.items())
    (HERE / "limits.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        sys.exit(write(sys.argv[2:]))
    sys.exit(process.run([str(HERE / "machine_code.py")]))
