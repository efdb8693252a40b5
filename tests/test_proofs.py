"""The table of deep proofs: what makes one stale, and that it declares all that it compiles."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "cusim"))
import proof_tools
import proofs
from proofs import PROOFS, ROOT, Proof

import build

FILES = proofs.contents()
DIGESTS = {name: proofs.digest(proof, FILES) for name, proof in PROOFS.items()}

by_proof = pytest.mark.parametrize("name", PROOFS)


def stale_after(changed):
    """Names of the proofs that a change of some files makes stale."""
    files = FILES | dict.fromkeys(changed, "changed")
    return {name for name, proof in PROOFS.items() if proofs.digest(proof, files) != DIGESTS[name]}


@by_proof
def test_every_declared_input_is_there(name):
    for pattern in PROOFS[name].inputs:
        one = Proof((), (pattern,), ())
        assert proofs.inputs_of(one, FILES), f"{name}: nothing matches {pattern!r}; was it moved?"


@by_proof
def test_every_declared_input_makes_its_proof_stale(name):
    proof, inputs = PROOFS[name], proofs.inputs_of(PROOFS[name], FILES)
    files = {path: FILES[path] for path, _ in inputs}
    assert proofs.digest(proof, files) == DIGESTS[name]
    for path, whole in inputs:
        changed = files | {path: "changed"}
        assert (proofs.digest(proof, changed) != DIGESTS[name]) == whole, path
        gone = {other: sha for other, sha in files.items() if other != path}
        assert proofs.digest(proof, gone) != DIGESTS[name], path


@by_proof
def test_another_tool_or_command_makes_a_proof_stale(name):
    tools = proofs.tools_of(PROOFS[name], lambda tool: "1.0")
    entry = {"inputs": DIGESTS[name], "tools": tools}
    assert proofs.is_fresh(entry, DIGESTS[name], tools)
    for tool in tools:
        assert not proofs.is_fresh(entry, DIGESTS[name], tools | {tool: "1.1"})
        # what is not here is not another one: the sources decide
        assert proofs.is_fresh(entry, DIGESTS[name], tools | {tool: None})
    assert not proofs.is_fresh(None, DIGESTS[name], tools)
    proof = PROOFS[name]
    other = Proof((*proof.tests, "-x"), proof.inputs, proof.tools, proof.packages)
    assert proofs.digest(other, FILES) != DIGESTS[name]


def of(*engines):
    return {name for name in PROOFS if name.startswith(engines)}


@pytest.mark.parametrize(
    "path, wanted",
    (
        ("kernels/cuda/select.cu", of("cuda-")),
        ("kernels/cuda/device.cuh", of("cuda-")),
        ("csrc/cuda/plan.cpp", of("cuda-") - {"cuda-registers"}),
        ("kernels/triton/select.py", of("triton-")),
        ("csrc/cpu/pool.cpp", of("cpu-")),
        ("kernels/cpu/isa/avx2.cpp", of("cpu-")),
        ("visionpulse/models/session.py", of("models-", "answers", "lmms-eval")),
        ("README.md", set()),
    ),
)
def test_a_change_makes_the_proofs_of_its_engine_stale_and_no_other(path, wanted):
    assert path in FILES and stale_after([path]) == wanted


def test_a_change_of_what_engines_share_makes_both_stale():
    for path in FILES:
        if path.startswith("kernels/common/"):
            assert stale_after([path]) == of("cpu-", "cuda-"), path


def test_every_deep_test_belongs_to_a_proof():
    marked = [p for p in FILES if re.match(r"tests/.*test_\w+\.py", p)
              and re.search(r"mark\.deep", (ROOT / p).read_text())]  # fmt: skip
    assert len(marked) > 5
    run = [word for proof in PROOFS.values() for word in proof.tests if word.startswith("tests/")]
    for path in set(marked) - {"tests/test_proofs.py"}:
        assert any(path == word or path.startswith(f"{word}/") for word in run), path


def declared(name):
    return {path for path, whole in proofs.inputs_of(PROOFS[name], FILES) if whole}


def included(compiler, source, *options):
    """Files of this repository that a compiler says it reads, by its own list."""
    command = [compiler, "-M", "-std=c++17", *options, f"-I{ROOT}", str(ROOT / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.replace("\\\n", " ").split()[1:]
    paths = {Path(os.path.normpath(ROOT / word)) for word in words}
    inside = {str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT)}
    return inside & FILES.keys()


COMPILER = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")


@needs_compiler
def test_what_the_cpu_kernels_are_compiled_of_is_declared():
    sources = [path for path in FILES if path.endswith(".cpp")
               and path.startswith(("csrc/cpu/", "kernels/cpu/", "tests/cpp/"))]  # fmt: skip
    assert len(sources) > 6
    found = set()
    for source in sources:  # -MG: headers of another architecture are not here
        found |= included(COMPILER, source, "-MG", "-march=x86-64-v4")
    assert {"kernels/common/args.h", "tests/cpp/problem.h"} <= found
    for name in ("cpu-units", "cpu-memory", "cpu-threads", "cpu-arm"):
        assert found <= declared(name), found - declared(name)
    kernels = {path for path in found if not path.startswith("tests/")}
    assert kernels | included(COMPILER, "csrc/module.cpp", "-MG") <= declared(
        "cpu-instruction-sets"
    ) | {path for path in FILES if path.startswith("csrc/cuda/")}


@needs_compiler
def test_what_the_simulated_kernels_are_compiled_of_is_declared():
    options = ("-x", "c++", *build._flags(), f"-I{build.HERE}", f"-I{build.HERE / 'include'}")
    found = set()
    for source in (*build.KERNELS, *build.HOST, build.BINDINGS):
        found |= included(COMPILER, source, *options)
    assert {"kernels/common/args.h", "kernels/cuda/device.cuh", "tests/cusim/cusim.h"} <= found
    for name in ("cuda-plans", "cuda-simulated", "cuda-planted-bugs", "cuda-graphs"):
        assert found <= declared(name), found - declared(name)


@pytest.mark.skipif(proof_tools.NVCC is None, reason="no nvcc")
def test_what_nvcc_reads_is_declared():
    found = set()
    for source in build.KERNELS:
        found |= included(proof_tools.NVCC, source)
    assert {"kernels/common/args.h", "kernels/cuda/device.cuh"} <= found
    assert found <= declared("cuda-registers")


# Of the package they import it all; what is no part of a kernel, nor handed to one, is left out.
TRITON_SOURCES = """
import sys
sys.path.insert(0, "tests/triton")
import aot, faults, interpreted, launches, machine_code, process, repairs
from visionpulse.backends import triton
for module in list(sys.modules.values()):
    print(getattr(module, "__file__", None) or "")
"""


def test_what_triton_compiles_is_declared():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON_SOURCES], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {Path(line) for line in done.stdout.splitlines() if line}
    loaded = {str(path.relative_to(ROOT)) for path in loaded if path.is_relative_to(ROOT)}
    found = {path for path in loaded if path.startswith(("kernels/", "tests/"))}
    kernels = {path for path in FILES if path.startswith("kernels/triton/")}
    assert kernels <= found | {"kernels/triton/__init__.py"}
    for name in of("triton-"):
        assert found | {"visionpulse/backends/triton.py"} <= declared(name)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A table of two proofs on files that are not there, and what they do."""
    files, does = {"a.txt": "1", "b.txt": "1"}, {"one": True, "two": True}
    table = {n: Proof((), (f"{f}.txt",), ()) for n, f in (("one", "a"), ("two", "b"))}
    ran = []
    monkeypatch.setattr(proofs, "PROOFS", table)
    monkeypatch.setattr(proofs, "TABLE", tmp_path / "proofs.json")
    monkeypatch.setattr(proofs, "contents", lambda: dict(files))
    monkeypatch.setattr(proofs, "run", lambda name, proof: ran.append(name) or does[name])

    def main(*arguments):
        ran.clear()
        return proofs.main(list(arguments)), list(ran)

    return main, files, does


def test_what_passed_is_left_out_until_an_input_changes(small):
    main, files, _ = small
    assert main() == (0, ["one", "two"])
    assert main() == (0, [])
    files["a.txt"] = "2"
    assert main() == (0, ["one"])
    assert main("--force") == (0, ["one", "two"])
    assert main("--only", "two") == (0, [])
    assert main("--only", "two", "--force") == (0, ["two"])


def test_what_fails_is_not_noted_and_a_false_table_is_found_out(small):
    main, _, does = small
    does["two"] = False
    assert main() == (1, ["one", "two"])
    assert set(json.loads(proofs.TABLE.read_text())) == {"one"}
    assert main() == (1, ["two"])
    does.update(one=False, two=True)  # the table says that "one" passed
    assert main() == (0, ["two"])
    chosen = {name: main("--also-one", commit) for name, commit in (("two", "1"), ("one", "2"))}
    assert chosen == {"two": (0, ["two"]), "one": (1, ["one"])}
    assert set(json.loads(proofs.TABLE.read_text())) == {"two"}


def test_a_proof_whose_tool_is_not_here_is_named(small, monkeypatch, capsys):
    main, _, _ = small
    monkeypatch.setitem(proofs.PROOFS, "two", Proof((), ("b.txt",), ("no-such-compiler",)))
    assert main() == (0, ["one"])
    assert "not proven here: two (no no-such-compiler)" in capsys.readouterr().out
    assert main("--only", "two") == (1, [])  # asked for by name


def test_a_proof_without_its_engine_is_named_and_does_not_run(small, monkeypatch, capsys):
    main, _, _ = small

    def fails():
        raise proofs.engine_environment.NoEngineError("no wheel for this machine")

    monkeypatch.setattr(proofs.engine_environment, "python", fails)
    monkeypatch.setitem(proofs.PROOFS, "two", Proof((), ("b.txt",), (), engine=True))
    assert main() == (0, ["one"])
    assert "not proven here: two (no wheel for this machine)" in capsys.readouterr().out
    assert main("--only", "two") == (1, [])  # asked for by name


def test_an_unknown_proof_is_named(small, capsys):
    with pytest.raises(SystemExit):
        small[0]("--only", "three")
    assert "no proof three; known: one, two" in capsys.readouterr().err
