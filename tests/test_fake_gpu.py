"""What only a GPU runs, graphs and device tensors, on a device that merely says it is one.

Each run has a process of its own, since torch itself is made to see the device.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE, CUSIM = ROOT / "tests" / "fakegpu", ROOT / "tests" / "cusim"
sys.path.insert(0, str(CUSIM))
COMPILER = os.environ.get("CXX", "g++")
# of tests/test_gpu.py, those that a simulated kernel gets through in seconds
OF_GPU = "cuda and (reads_nothing or follows_lengths or outlives or two_graphs or tables)"
QUIET = ("-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "plugin")


def run(*arguments, **more):
    paths = os.pathsep.join(map(str, (ROOT, FAKE, CUSIM)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, "-m", "pytest", *QUIET, *arguments]
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(command, cwd=ROOT, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.deep
def test_benchmarks_and_patched_models():
    assert "skipped" not in run("tests/fakegpu/checks.py")


@pytest.mark.deep
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
def test_graphs_of_the_simulated_kernels():
    from build import build

    module = build()
    said = run("tests/test_gpu.py", "-k", OF_GPU, CUSIM_MODULE=str(module))
    assert "6 passed" in said
    said = run("tests/test_gpu_smoke.py", "-k", "cuda", CUSIM_MODULE=str(module))
    assert "54 passed" in said
