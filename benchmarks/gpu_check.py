"""Prove the GPU backends on a GPU, and leave rows and logs behind. Needs no network and no git.

    python benchmarks/gpu_check.py --results results --commit 5e227ad
    python benchmarks/gpu_check.py --results results --parts suite,models --built results/built

The parts of gpu_parts.py run in the order of worth, what is lost last first: build, a test of every
kernel in seconds, tables of stages and steps (rows go to RESULTS/gpu.jsonl), a profile of the
launches that decide the latency model, then the suites, whole models, the sanitizers, vLLM.
Each can be run alone, and builds first what is not there. What was built lies in RESULTS/built: on
another machine `--built` takes it from there instead, if its sources are the same.

A run ends within --minutes: what did not fit is named, with the command for the rest. Each part has
its log in RESULTS, RESULTS/summary.txt says how each command ended, and RESULTS/junit.xml what
became of each test, also of suites that were ended. A command that fails or takes too long leaves
the rest; a table that fails with several backends is made again with each alone. The exit code is
the number of commands that failed or were left out.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_parts import BACKENDS, PARTS, Command, Run, build, named
from suite_log import Fate, fates, junit

ROOT = Path(__file__).resolve().parents[1]
LEAST = 10  # seconds: with fewer left a command is not started
STAMP = ROOT / "build" / "gpu-check.txt"  # of which sources the module in place was built
SOURCES = ("csrc", "kernels/common", "kernels/cpu", "kernels/cuda", "CMakeLists.txt", "setup.py")
HAS_CUDA = "from visionpulse._native import module; assert module().has_cuda"


class Check:
    """The run: its logs, its summary, the time that is left."""

    def __init__(self, results: Path, minutes: float, built: Path | None = None) -> None:
        self.results, self.ends = results, time.monotonic() + 60 * minutes
        self.built = built or results / "built"
        self.failed = 0
        self.left: list[str] = []  # parts of which something was not run
        self.suites: dict[str, dict[str, Fate]] = {}

    def say(self, line: str) -> None:
        print(line, flush=True)
        with (self.results / "summary.txt").open("a") as summary:
            summary.write(line + "\n")

    def run(self, part: str, command: Command) -> bool:
        """Run one command, its output in the log of its part; whether it ended well."""
        left, log = self.ends - time.monotonic(), self.results / f"{part}.log"
        what = " ".join(command.words)
        if command.missing or left < LEAST:
            why = command.missing or "no time was left; give it a run of its own with --parts"
            self.failed += 1
            if not command.missing and part not in self.left:
                self.left.append(part)
            self.say(f"{part:<9} NOT RUN ({why}): {what}")
            return False
        began, lines = time.monotonic(), self.results / "suite.jsonl"
        words = command.words
        if command.suite:
            lines.unlink(missing_ok=True)
            words = [*words, "-p", "suite_log", "--suite-log", str(lines)]
        with log.open("a") as out:
            out.write(f"$ {what}\n")
            out.flush()
            ended = finished(words, command.environment, min(command.seconds, left), out)
            out.write(f"[{ended}, {time.monotonic() - began:.0f} s]\n\n")
        self.failed += ended != "ok"
        self.say(f"{part:<9} {ended:<12} {time.monotonic() - began:5.0f} s  {what}")
        if command.suite and lines.exists():
            self.keep_fates(command.suite, lines)
        for again in command.alone if ended != "ok" else ():
            self.run(part, again)
        return ended == "ok"

    def keep_fates(self, suite: str, lines: Path) -> None:
        """Put what became of the tests of a suite beside that of the others."""
        tests = self.suites[suite] = fates(lines.read_text().splitlines(keepends=True))
        (self.results / "junit.xml").write_text(junit(self.suites))
        lines.unlink()
        for test, fate in tests.items():
            if fate.outcome in ("failed", "hung"):
                self.say(f"          {fate.outcome}: {test}")

    def build(self, run: Run) -> None:
        """Build in place, or take what was built of the same sources elsewhere."""
        carried, sources = carried_module(self.built), digest()
        for command in build(run):
            environment = {"VISIONPULSE_PREBUILT": str(carried)} if carried else {}
            ended = self.run("build", Command(command.words, command.seconds, environment))
        if ended and not carried:
            STAMP.parent.mkdir(exist_ok=True)
            kept = self.results / "built"
            kept.mkdir(exist_ok=True)
            for module in (ROOT / "visionpulse").glob("_C*.so"):
                shutil.copy2(module, kept)
            (kept / STAMP.name).write_text(sources)
        if ended:
            STAMP.write_text(sources)


def digest() -> str:
    """Of all that the module is built from."""
    sha = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
            if file.is_file():
                sha.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    for name in ("VISIONPULSE_CUDA_ARCHS", "VISIONPULSE_LINEINFO"):
        sha.update(f"{name}={os.environ.get(name, '')}".encode())
    return sha.hexdigest()


def is_built() -> bool:
    """Whether the module in place has CUDA, and is of these sources."""
    if not STAMP.exists() or STAMP.read_text() != digest():
        return False
    return subprocess.run([sys.executable, "-c", HAS_CUDA], cwd=ROOT, check=False).returncode == 0


def carried_module(folder: Path) -> Path | None:
    """The module of a folder, if it is of these sources."""
    stamp, modules = folder / STAMP.name, sorted(folder.glob("_C*.so"))
    if not modules or not stamp.exists() or stamp.read_text() != digest():
        return None
    return modules[0]


def finished(words: list[str], more: dict[str, str], seconds: float, out) -> str:
    """How a command ended; past its time all that it started is ended too."""
    paths = os.pathsep.join((str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep)} | more
    try:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment,
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


def rest(check: Check, options: argparse.Namespace) -> str:
    """The command for the parts that had no time."""
    words = ["python", "benchmarks/gpu_check.py", "--parts", ",".join(check.left)]
    words += ["--built", str(check.results / "built"), "--results", str(options.results)]
    return shlex.join([*words, *(["--commit", options.commit] if options.commit else [])])


def main() -> int:
    lines = [f"  {name:<16} {part.what}" for name, part in PARTS.items()]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="\n".join(["parts:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to fill")
    parser.add_argument("--parts", default=",".join(PARTS), help="names below, by comma")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="by comma")
    parser.add_argument("--minutes", type=float, default=8.75, help="that all of it may take")
    parser.add_argument("--commit", default="", help="of rows made where git cannot be asked")
    parser.add_argument("--built", type=Path, help="folder `built` of another run's results")
    options = parser.parse_args()
    try:
        parts = named(options.parts)
    except ValueError as error:
        parser.error(str(error))
    results: Path = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    check = Check(results, options.minutes, options.built and options.built.resolve())
    run = Run(results, options.backends.split(","))
    if "build" in parts or not is_built():
        check.build(run)
    for part in parts:
        for command in PARTS[part].commands(run) if part != "build" else ():
            check.run(part, command)
        stamp(run.rows, options.commit)
    if check.left:
        check.say(f"the rest: {rest(check, options)}")
    check.say(f"{check.failed} of the commands failed or were not run")
    return check.failed


if __name__ == "__main__":
    sys.exit(main())
