"""The CUDA kernels on a simulated GPU, in seconds: few kernels, and the problems that tell most."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cusim"))
from build import FEW, HERE, ROOT, build

NO_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is None
pytestmark = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")

ONE_SM = "90,1,232448"  # few splits: every warp meets more tiles than it has stages
NO_CLUSTERS = "80,5,101376"
# Shared tests, with layouts, ragged rows and ties, of a head dim that is built.
OF_ALL_BACKENDS = "(grouped or ragged or paged or ties) and bfloat16 and (stages or neighbours)"


@pytest.fixture(scope="module")
def simulated():
    """Run Python on the simulated kernels."""
    module = build(kernels=FEW)

    def run(*words, **more):
        paths = os.pathsep.join(map(str, (ROOT, HERE)))
        own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUSIM_MODULE": str(module)}
        options = {"capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=os.environ | own | more, **options
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    return run


@pytest.mark.parametrize(
    "what, dtype, gpu, landing",
    (
        ("probe", "bfloat16", ONE_SM, "late"),
        ("probe", "float8", NO_CLUSTERS, "early"),
        ("choices", "bfloat16", NO_CLUSTERS, "late"),
        ("traffic", "bfloat16", ONE_SM, "early"),
        ("devices", "float8", ONE_SM, "late"),
    ),
)
def test_the_kernels_are_the_contract(simulated, what, dtype, gpu, landing):
    simulated(HERE / "problems.py", what, dtype, CUSIM_GPU=gpu, CUSIM_LANDING=landing)


def test_the_suite_of_all_backends_passes(simulated):
    quiet = ("-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "stand_in")
    suite = ("tests/test_backends.py", "--backends", "cuda", "--require-backends", "cuda")
    said = simulated("-m", "pytest", *quiet, *suite, "-k", OF_ALL_BACKENDS)
    assert " passed" in said and "failed" not in said
