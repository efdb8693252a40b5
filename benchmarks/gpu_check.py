"""Prove the GPU backends on a GPU, and leave rows and a log behind. Needs no network.

    python benchmarks/gpu_check.py --results results          # everything, under nine minutes
    python benchmarks/gpu_check.py --results results --parts tests,bench

Parts: `build` (in place, for the GPUs present), `tests` (the shared suite on the GPU backends, then
graphs, streams, hammer and dirty workspaces), `sanitize` (compute-sanitizer's memcheck, racecheck
and synccheck on small cases), `bench` (tables, whose rows go to RESULTS/gpu.jsonl). Each part has
its own log in RESULTS; the exit code is the number of commands that failed.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "sanitize", "bench")
BACKENDS = "cuda,triton"
SMALL = (
    "decode_is_the_contract and (grouped or group7 or group32 or paged-hnd or long) and bfloat16"
)

Command = list[str]


def build() -> list[Command]:
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    return [[*pip, "--no-index", "--editable", "."]]


def tests(backends: str) -> list[Command]:
    pytest = [sys.executable, "-m", "pytest", "-q", "--no-header"]
    chosen = ["--backends", backends, "--require-backends", backends]
    return [
        [*pytest, "tests/test_backends.py", *chosen],
        [*pytest, "tests/test_gpu.py"],
    ]


def sanitize(backends: str) -> list[Command]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise FileNotFoundError("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "tests/test_backends.py"]
    chosen = [*pytest, "--backends", backends, "-k", SMALL]
    return [
        [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all", *chosen]
        for check in ("memcheck", "racecheck", "synccheck")
    ]


def bench(rows: Path, backends: str) -> list[Command]:
    shared = ["--device", "cuda", "--backends", backends, "--out", str(rows)]
    stages = [sys.executable, "benchmarks/bench_layers.py", *shared, "--dtypes", "bf16"]
    steps = [sys.executable, "benchmarks/bench_decode.py", *shared, "--dtypes", "bf16"]
    # the published setting, whole models; their caches are as many gigabytes
    model = [sys.executable, "benchmarks/bench_model.py", *shared, "--dtypes", "bf16"]
    return [
        [*stages, "--shapes", "b1-4k,b1-16k,b1-128k,b8-16k,b8-32k,b8-128k"],
        [*steps, "--shapes", "b1-16k,b8-8k,b8-16k,b8-32k", "--baselines", "all"],
        [*model, "--model", "full", "--shapes", "b1-16k,b8-8k,b8-16k,b8-32k", "--budget", "50000",
         "--theirs-up-to", "32768", "--rounds", "5", "--prefill", "1024", "--no-overhead"],
    ]  # fmt: skip


def run(name: str, command: Command, log: Path) -> bool:
    """Run one command, its output in the log of its part."""
    began = time.perf_counter()
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT).returncode
        seconds = time.perf_counter() - began
        out.write(f"[exit {code}, {seconds:.0f} s]\n\n")
    print(f"{name:<9} {'ok' if code == 0 else f'FAILED ({code})':<12} {seconds:5.0f} s  {log}")
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to fill")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, by comma")
    parser.add_argument("--backends", default=BACKENDS, help="by comma")
    options = parser.parse_args()
    results: Path = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    failed = 0
    for part in options.parts.split(","):
        commands = {
            "build": build,
            "tests": lambda: tests(options.backends),
            "sanitize": lambda: sanitize(options.backends),
            "bench": lambda: bench(results / "gpu.jsonl", options.backends),
        }[part]()
        failed += sum(not run(part, command, results / f"{part}.log") for command in commands)
    return failed


if __name__ == "__main__":
    sys.exit(main())
