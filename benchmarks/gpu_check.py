"""Prove the GPU backends on a GPU, and leave rows and logs behind. Needs no network and no git.

    python benchmarks/gpu_check.py --results results --parts build,tests --commit 5e227ad
    python benchmarks/gpu_check.py --results results --parts bench --commit 5e227ad
    python benchmarks/gpu_check.py --results results --parts sanitize

Parts: `build` (in place, for the GPUs present), `tests` (the shared suite on each GPU backend, then
graphs, streams, hammer and dirty workspaces), `bench` (tables, whose rows go to RESULTS/gpu.jsonl),
`sanitize` (compute-sanitizer's memcheck, racecheck and synccheck on small cases), `serve` (the tiny
model in vLLM, which must be installed); without --parts all, in this order. A run ends within
--minutes: what did not fit is named, and wants a run of its own. Each part has its log in RESULTS,
and RESULTS/summary.txt says how each command ended. One that fails or takes too long leaves the
rest; a bench that fails with several backends is run again with each alone. The exit code is the
number of commands that failed or were left out.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "bench", "sanitize", "serve")
BACKENDS = "cuda,triton"
SMALL = (
    "decode_is_the_contract and (grouped or group7 or group32 or paged-hnd or long) and bfloat16"
)
WORKERS = 12  # of tests, each with a context of its own on the GPU
LEAST = 10  # seconds: with fewer left a command is not started
STAGES = "b1-4k,b1-16k,b1-128k,b8-16k,b8-32k,b8-128k"
STEPS = "b1-16k,b8-8k,b8-16k,b8-32k"


@dataclass(frozen=True)
class Command:
    """One process of a part, and how long it may take."""

    words: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""  # why it cannot be run
    alone: tuple["Command", ...] = ()  # to run where it fails


def python(*words: str) -> list[str]:
    return [sys.executable, "-u", *words]


def build() -> list[Command]:
    pip = python("-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index")
    return [Command([*pip, "--editable", "."], 240)]


def pytest(*words: str, spread: bool) -> list[str]:
    # most of the time goes to Triton's compiler, on one core per process
    several = spread and find_spec("xdist") is not None
    workers = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if several else []
    return python("-m", "pytest", "-q", "--no-header", "-o", "faulthandler_timeout=60", *workers,
                  *words)  # fmt: skip


def tests(backends: list[str]) -> list[Command]:
    shared = ("tests/test_backends.py", "tests/test_float8.py")
    suite = [
        pytest(*shared, "--backends", one, "--require-backends", one, spread=True)
        for one in backends
    ]
    graphs = [
        pytest("tests/test_gpu.py", "--backends", one, "--require-backends", one, spread=False)
        for one in backends
    ]
    info = Command(python("-m", "visionpulse", "info"), 60)
    return [info, *(Command(words, 200) for words in (*suite, *graphs))]


def sanitize(backends: list[str]) -> list[Command]:
    tool = shutil.which("compute-sanitizer")
    missing = "" if tool else "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    # torch's cache of memory would hide what lies next to a buffer
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Command(
            [
                tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9",
                "--target-processes", "all",
                *pytest("-x", "tests/test_backends.py", "--backends", one, "-k", SMALL,
                        spread=False),
            ],
            120, watched if check == "memcheck" else {}, missing,
        )
        for one in backends
        for check in ("memcheck", "racecheck", "synccheck")
    ]  # fmt: skip


def serve() -> list[Command]:
    """Eager steps against full graphs, over both attention backends and both model runners."""
    missing = "" if find_spec("vllm") else "vllm is not installed; pip install vllm"
    return [
        Command(
            python("tests/serving/gpu_serve.py", backend), 400,
            {"VLLM_USE_V2_MODEL_RUNNER": runner}, missing,
        )
        for backend in ("TRITON_ATTN", "FLASH_ATTN")
        for runner in ("0", "1")
    ]  # fmt: skip


def bench(rows: Path, backends: list[str]) -> list[Command]:
    def script(name: str, seconds: int, *words: str) -> Command:
        def run(names: list[str]) -> list[str]:
            shared = ["--device", "cuda", "--out", str(rows), "--dtypes", "bf16"]
            return python(f"benchmarks/{name}", *shared, "--backends", ",".join(names), *words)

        alone = tuple(Command(run([one]), seconds) for one in backends) if backends[1:] else ()
        return Command(run(backends), seconds, alone=alone)

    return [
        script("bench_layers.py", 200, "--shapes", STAGES),
        script("bench_decode.py", 200, "--shapes", STEPS),
        # the published setting, whole models; their caches are as many gigabytes
        script("bench_model.py", 200, "--model", "full", "--shapes", STEPS, "--budget", "50000",
               "--theirs-up-to", "32768", "--rounds", "5", "--prefill", "1024", "--no-overhead"),
        # each kind of layer is compiled first: one shape, and last
        script("bench_decode.py", 150, "--shapes", "b8-16k", "--schedules", "dense,paper",
               "--baselines", "torch-sdpa-grouped,flex-attention"),
    ]  # fmt: skip


class Check:
    """The run: its logs, its summary, the time that is left."""

    def __init__(self, results: Path, minutes: float) -> None:
        self.results, self.ends = results, time.monotonic() + 60 * minutes
        self.failed = 0

    def say(self, line: str) -> None:
        print(line, flush=True)
        with (self.results / "summary.txt").open("a") as summary:
            summary.write(line + "\n")

    def run(self, part: str, command: Command) -> None:
        """Run one command, its output in the log of its part."""
        left, log = self.ends - time.monotonic(), self.results / f"{part}.log"
        what = " ".join(command.words)
        if command.missing or left < LEAST:
            why = command.missing or "no time was left; give it a run of its own with --parts"
            self.failed += 1
            self.say(f"{part:<9} NOT RUN ({why}): {what}")
            return
        began = time.monotonic()
        with log.open("a") as out:
            out.write(f"$ {what}\n")
            out.flush()
            ended = finished(command, min(command.seconds, left), out)
            out.write(f"[{ended}, {time.monotonic() - began:.0f} s]\n\n")
        self.failed += ended != "ok"
        self.say(f"{part:<9} {ended:<12} {time.monotonic() - began:5.0f} s  {what}")
        for again in command.alone if ended != "ok" else ():
            self.run(part, again)


def finished(command: Command, seconds: float, out) -> str:
    """How a command ended; past its time all that it started is ended too."""
    environment = os.environ | command.environment
    try:
        process = subprocess.Popen(
            command.words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"FAILED ({error})"
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"TOO LONG (over {seconds:.0f} s)"
    return "ok" if code == 0 else f"FAILED ({code})"


def stamp(path: Path, commit: str) -> None:
    """Say which commit rows come from where there was no git to ask."""
    if not path.exists():
        return
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for row in rows:
        row["machine"]["commit"] = row["machine"]["commit"] or commit
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to fill")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, by comma")
    parser.add_argument("--backends", default=BACKENDS, help="by comma")
    parser.add_argument("--minutes", type=float, default=8.75, help="that all of it may take")
    parser.add_argument("--commit", default="", help="of rows made where git cannot be asked")
    options = parser.parse_args()
    parts, backends = options.parts.split(","), options.backends.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    results: Path = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    check, rows = Check(results, options.minutes), results / "gpu.jsonl"
    for part in parts:
        commands = {
            "build": build,
            "tests": lambda: tests(backends),
            "sanitize": lambda: sanitize(backends),
            "bench": lambda: bench(rows, backends),
            "serve": serve,
        }[part]()
        for command in commands:
            check.run(part, command)
        stamp(rows, options.commit)
    check.say(f"{check.failed} of the commands failed or were not run")
    return check.failed


if __name__ == "__main__":
    sys.exit(main())
