"""The parts of gpu_check.py, in the order of worth, and the commands of each."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

BACKENDS = ("cuda", "triton")
SMALL = (
    "decode_is_the_contract and (grouped or group7 or group32 or paged-hnd or long) and bfloat16"
)
WORKERS = 16  # of tests, each with a context of its own on the GPU
MOST = 480  # seconds of a part and the build before it, on 16 cores
BUILD = 130
STAGES = "b1-4k,b1-16k,b1-128k,b8-16k,b8-32k,b8-128k"
STEPS = "b1-16k,b8-8k,b8-16k,b8-32k"
SHARED = ("tests/test_backends.py", "tests/test_float8.py", "tests/test_queries.py")


@dataclass(frozen=True)
class Command:
    """One process of a part, and how long it may take."""

    words: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""  # why it cannot be run
    alone: tuple["Command", ...] = ()  # to run where it fails
    suite: str = ""  # of pytest: its name among the suites of junit


class Run(NamedTuple):
    """What the parts need to know of a run."""

    results: Path
    backends: list[str]

    @property
    def rows(self) -> Path:
        return self.results / "gpu.jsonl"


def python(*words: str) -> list[str]:
    return [sys.executable, "-u", *words]


def build(run: Run) -> list[Command]:
    pip = python("-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index")
    return [Command([*pip, "--editable", "."], BUILD)]


def pytest(name: str, seconds: int, *words: str, spread: bool = False) -> Command:
    # most of the time goes to Triton's compiler, on one core per process
    several = spread and find_spec("xdist") is not None
    workers = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if several else []
    made = python("-m", "pytest", "-q", "--no-header", "-o", "faulthandler_timeout=60", *workers,
                  *words)  # fmt: skip
    return Command(made, seconds, suite=name)


def of_each(name: str, seconds: int, *tests: str, spread: bool = False) -> Callable:
    """A suite once for each backend."""

    def commands(run: Run) -> list[Command]:
        return [
            pytest(f"{name}-{one}", seconds, *tests, "--backends", one, "--require-backends", one,
                   spread=spread)
            for one in run.backends
        ]  # fmt: skip

    return commands


def smoke(run: Run) -> list[Command]:
    """Each kernel once; Triton's are compiled first."""
    info = Command(python("-m", "visionpulse", "info"), 60)
    return [info, *of_each("smoke", 90, "tests/test_gpu_smoke.py", spread=True)(run)]


def table(run: Run, name: str, seconds: int, *words: str) -> Command:
    """A script whose rows are added to those of the run."""

    def of(names: list[str]) -> list[str]:
        shared = ["--device", "cuda", "--out", str(run.rows), "--dtypes", "bf16"]
        return python(f"benchmarks/{name}", *shared, "--backends", ",".join(names), *words)

    several = len(run.backends) > 1
    alone = tuple(Command(of([one]), seconds) for one in run.backends) if several else ()
    return Command(of(run.backends), seconds, alone=alone)


def stages(run: Run) -> list[Command]:
    return [table(run, "bench_layers.py", 330, "--shapes", STAGES)]


def decode(run: Run) -> list[Command]:
    return [table(run, "bench_decode.py", 330, "--shapes", STEPS)]


def profile(run: Run) -> list[Command]:
    """The launches that tell whether the latency model is right, by ncu or without it."""
    script = python("benchmarks/profile_launches.py", "--backends", ",".join(run.backends))
    made = [Command(script, 120)]
    if ncu := shutil.which("ncu"):
        report = str(run.results / "launches")
        words = [ncu, "--profile-from-start", "off", "--set", "full", "--import-source", "yes",
                 "--cache-control", "all", "--force-overwrite", "-o", report]  # fmt: skip
        made.append(Command([*words, *script, "--once"], 180))
    return made


def models(run: Run) -> list[Command]:
    """The published setting, whole models: their caches are as many gigabytes."""
    whole = ("--model", "full", "--shapes", STEPS, "--budget", "50000", "--theirs-up-to", "32768",
             "--rounds", "5", "--prefill", "1024", "--no-overhead")  # fmt: skip
    # each kind of layer is compiled first: one shape
    compiled = ("--shapes", "b8-16k", "--schedules", "dense,paper",
                "--baselines", "torch-sdpa-grouped,flex-attention")  # fmt: skip
    return [
        table(run, "bench_model.py", 200, *whole),
        table(run, "bench_decode.py", 130, *compiled),
    ]


def sanitize(run: Run) -> list[Command]:
    tool = shutil.which("compute-sanitizer")
    missing = "" if tool else "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    # torch's cache of memory would hide what lies next to a buffer
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    made = []
    for one in run.backends:
        for check in ("memcheck", "racecheck", "synccheck"):
            tests = ("-x", "tests/test_backends.py", "--backends", one, "-k", SMALL)
            of = pytest(f"{check}-{one}", 55, *tests)
            words = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9",
                     "--target-processes", "all", *of.words]  # fmt: skip
            environment = watched if check == "memcheck" else {}
            made.append(Command(words, of.seconds, environment, missing, suite=of.suite))
    return made


def serve(backend: str, runner: str) -> Callable[[Run], list[Command]]:
    """Eager steps against full graphs of the tiny model in vLLM."""
    missing = "" if find_spec("vllm") else "vllm is not installed; pip install vllm"
    script = python("tests/serving/gpu_serve.py", backend)
    return lambda run: [Command(script, 340, {"VLLM_USE_V2_MODEL_RUNNER": runner}, missing)]


class Part(NamedTuple):
    """`what` is said by --help."""

    commands: Callable[[Run], list[Command]]
    what: str


# A part stands for the group that its name begins with, too: `serve` is all of vLLM.
PARTS = {
    "build": Part(build, "in place, for the GPUs present"),
    "smoke": Part(smoke, "each kernel once, in seconds"),
    "stages": Part(stages, "times of each stage; rows go to gpu.jsonl"),
    "decode": Part(decode, "times of all layers of a step"),
    "profile": Part(profile, "the two launches that the latency model stands or falls with"),
    "device": Part(
        of_each("device", 170, "tests/test_gpu.py"), "graphs, streams, devices, a hammer"
    ),
    "suite": Part(of_each("suite", 170, *SHARED, spread=True), "the suite of all backends"),
    "models": Part(models, "times of whole models"),
    "sanitize": Part(sanitize, "memcheck, racecheck, synccheck of compute-sanitizer"),
    "serve-flash": Part(serve("FLASH_ATTN", "0"), "the tiny model in vLLM"),
    "serve-flash-v2": Part(serve("FLASH_ATTN", "1"), "the same by the other model runner"),
    "serve-triton": Part(serve("TRITON_ATTN", "0"), "the same beside vLLM's Triton kernels"),
    "serve-triton-v2": Part(serve("TRITON_ATTN", "1"), "the same by the other model runner"),
}


def named(words: str) -> list[str]:
    """Parts by their names or the beginning before a dash, in the order of worth."""
    asked = set(words.split(","))
    found = [name for name in PARTS if {name, name.partition("-")[0]} & asked]
    unknown = asked - set(found) - {name.partition("-")[0] for name in found}
    if unknown:
        raise ValueError(f"no part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    return found
