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
# of tests/test_gpu_smoke.py, with both head tiles of one kernel, or all
OF_SMOKE = {"few": "cuda and (stages or bfloat16-d64)", "all": "cuda"}
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


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
@pytest.mark.parametrize("which", ("few", pytest.param("all", marks=pytest.mark.deep)))
def test_graphs_of_the_simulated_kernels(which):
    from build import FEW, build

    module = build(kernels=FEW if which == "few" else None)
    said = run("tests/test_gpu.py", "-k", OF_GPU, CUSIM_MODULE=str(module))
    assert "6 passed" in said
    said = run("tests/test_gpu_smoke.py", "-k", OF_SMOKE[which], CUSIM_MODULE=str(module))
    assert f"{4 if which == 'few' else 54} passed" in said
