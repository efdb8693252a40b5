"""The Triton kernels without a GPU: two processes, whose results this file reports.

One interprets the kernels on CPU tensors and runs the shared backend tests, the other compiles
every launch for every chip. Each also runs with planted faults, and must then fail.
"""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from visionpulse.backends import get

HERE = Path(__file__).resolve().parent / "triton"
RUNS = {
    "compile 1 of 2": ("compile.py", "--share", "0/2"),
    "compile 2 of 2": ("compile.py", "--share", "1/2"),
    "interpreter 1 of 2": ("interpret.py", "--share", "0/2"),
    "interpreter 2 of 2": ("interpret.py", "--share", "1/2"),
}
# A telling few of both, in seconds.
FEW = {
    "compile": ("compile.py", "-k", "sm_90 and (dense-bfloat16 or follow-bfloat16)"),
    "interpreter": (
        "interpret.py", "-k", "(grouped or paged-hnd) and float32 and (stages or dense_decode)"
    ),
}  # fmt: skip
# A fault, the test that must see it, and what it says.
FILES = {
    "interpret.py": (
        *(str(HERE.parent / f"test_{name}.py") for name in ("backends", "queries", "float8")),
        str(HERE / "conversions.py"),
        *("--backends", "triton"),
    ),
    "compile.py": (str(HERE / "machine_code.py"),),
}
PLANTED = {
    "tail": ("interpret.py", "decode_is_the_contract and ragged and float32", "output: error|mass"),
    "list": ("interpret.py", "decode_is_the_contract and ragged and float32", "output: error"),
    "ties": ("interpret.py", "select_is_exact and two and 300-17", "ties go to the lowest index"),
    "minus-zero": ("interpret.py", "select_is_exact and zeros-of-both and 300-17",
                   "a kept score below|ties go to the lowest"),
    "neighbours": ("interpret.py", "neighbours and long and float32", "test_a_row_does_not_depend"),
    "merge": ("interpret.py", "dense_decode and long and float32", "output: error"),
    "nan": ("interpret.py", "every_code and float32", "Tensor-likes|assert"),
    "scale": ("interpret.py", "decode_is_the_contract and group5 and float32",
              "output: error|mass"),
    "column": ("interpret.py", "every_byte and even-by-integers", "Tensor-likes are not equal"),
    "single": ("compile.py", "sm_90-dense-float8", "0 conversions"),
    "tf32": ("compile.py", "sm_90-dense-float32", "TF32 in the machine code"),
    "spill": ("compile.py", "sm_90-dense-bfloat16", "spills, bytes of stack"),
    "narrow": ("compile.py", "sm_90-dense-bfloat16", "128-bit load"),
    "unfenced": ("compile.py", "sm_90-dense-bfloat16", "is not fenced"),
}  # fmt: skip

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def _run(script, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, HERE / script, "-q", "--no-header", "--tb=short", *arguments],
        cwd=HERE.parents[1], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(request):
    """All processes that the chosen tests need, two at a time."""
    wanted = {item.callspec.params["name"] for item in request.session.items
              if "results" in getattr(item, "fixturenames", ())}  # fmt: skip
    with ThreadPoolExecutor(max_workers=2) as pool:
        started = {name: pool.submit(_run, *RUNS[name]) for name in RUNS if name in wanted}
        for name, (script, test, _) in PLANTED.items():
            if name in wanted:
                options = (*FILES[script], "-k", test, "--plant", name)
                started[name] = pool.submit(_run, script, *options)
        yield started


@pytest.mark.parametrize("name", FEW)
def test_a_few_without_a_gpu(name):
    done = _run(*FEW[name])
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.deep
@pytest.mark.parametrize("name", RUNS)
def test_without_a_gpu(results, name, record_property):
    done = results[name].result()
    last = done.stdout.strip().splitlines()[-1]
    record_property("summary", last)
    print(f"{name}: {last}")
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.deep
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_seen(results, name):
    done = results[name].result()
    assert done.returncode == 1, f"not seen:\n{done.stdout[-4000:]}"
    assert re.search(PLANTED[name][-1], done.stdout), done.stdout[-4000:]


def test_the_page_of_bounds_is_what_the_table_implies():
    """Occupancy and bytes in the documentation are the output of a script, not typed."""
    made = subprocess.run(
        [sys.executable, HERE / "bounds.py"], check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    page = (HERE.parents[1] / "docs" / "internals" / "triton-bounds.md").read_text()
    for table in made.strip().split("\n\n"):
        assert table in page, f"triton-bounds.md lacks what bounds.py prints:\n{table}"


def test_it_says_why_it_cannot_run(monkeypatch):
    """Without a GPU and without the interpreter."""
    import torch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = get("triton").unavailable()
    assert "no GPU" in reason and "TRITON_INTERPRET=1" in reason
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in get("triton").unavailable()
