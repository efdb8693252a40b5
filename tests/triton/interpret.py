"""Run tests with Triton interpreted: `python tests/triton/interpret.py [pytest arguments]`.

A process of its own, because Triton reads the variable when a kernel is decorated.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import process
import repairs

HERE = Path(__file__).resolve().parent
SHARED = ("backends", "buffers", "queries", "float8")
SUITE = [
    *(str(HERE.parent / f"test_{name}.py") for name in SHARED),
    *(str(HERE / "interpreted.py"), str(HERE / "conversions.py"), "--backends", "triton"),
    # what other tests of a cache of 8-bit floats pass through too
    *("-k", "not (test_float8 and (dense_anchor or any_group or clear_error))"),
]

if __name__ == "__main__":
    repairs.compute_dots()
    repairs.patch_once()
    repairs.remember_types()
    repairs.skip_dropped_checks()
    repairs.keep_quiet()
    sys.exit(process.run(SUITE))
