"""The ranges around the stages of a step, and a profile read back: its ranges and its kernels.

A profile is nsys's sqlite export, or a trace of torch's profiler.
"""

import gzip
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

PREFIX = "visionpulse::"
_SQLITE = b"SQLite format 3\x00"
_PUSH_POP = 59  # NVTX_EVENTS.eventType of a range that one thread pushed and popped


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A range named `visionpulse::<name>` in a torch profile, and in NVTX where CUDA runs.

    Both, because torch's profiler does not see NVTX, nor nsys what torch records.
    """
    with torch.profiler.record_function(PREFIX + name):
        if not torch.cuda.is_available():
            yield
            return
        with torch.cuda.nvtx.range(PREFIX + name):
            yield


class Range(NamedTuple):
    """One range on one host thread, in microseconds."""

    name: str
    thread: int
    begin: float
    end: float


class Kernel(NamedTuple):
    """One kernel: its name, device time in microseconds, and the thread and time of its launch."""

    name: str
    duration: float
    thread: int | None = None
    launched: float | None = None


def read(path: str | Path) -> tuple[list[Range], list[Kernel]]:
    """Read either kind of profile."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(len(_SQLITE))
    return _from_nsys(path) if head == _SQLITE else _from_torch(path)


def _from_nsys(path: Path) -> tuple[list[Range], list[Kernel]]:
    base = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master")}
        if "NVTX_EVENTS" not in tables and "CUPTI_ACTIVITY_KIND_KERNEL" not in tables:
            raise ValueError(
                f"{path} has neither NVTX_EVENTS nor CUPTI_ACTIVITY_KIND_KERNEL; record with "
                "nsys profile --trace=cuda,nvtx and export with nsys export --type sqlite"
            )
        return _nsys_ranges(base, tables), _nsys_kernels(base, tables)
    finally:
        base.close()


def _nsys_ranges(base: sqlite3.Connection, tables: set[str]) -> list[Range]:
    if "NVTX_EVENTS" not in tables:
        return []
    rows = base.execute(
        "SELECT coalesce(e.text, s.value), e.globalTid, e.start, e.end FROM NVTX_EVENTS e "
        "LEFT JOIN StringIds s ON s.id = e.textId WHERE e.eventType = ? AND e.end IS NOT NULL",
        (_PUSH_POP,),
    )
    return [
        Range(text[len(PREFIX) :], thread, begin / 1e3, end / 1e3)
        for text, thread, begin, end in rows
        if text and text.startswith(PREFIX)
    ]


def _nsys_kernels(base: sqlite3.Connection, tables: set[str]) -> list[Kernel]:
    if "CUPTI_ACTIVITY_KIND_KERNEL" not in tables:
        return []
    launches: dict[tuple[int, int], tuple[int, float]] = {}
    if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
        rows = base.execute(
            "SELECT correlationId, globalTid, start FROM CUPTI_ACTIVITY_KIND_RUNTIME"
        )
        for correlation, thread, start in rows:
            launches[_process(thread), correlation] = thread, start / 1e3
    kernels = []
    rows = base.execute(
        "SELECT s.value, k.end - k.start, k.globalPid, k.correlationId "
        "FROM CUPTI_ACTIVITY_KIND_KERNEL k LEFT JOIN StringIds s ON s.id = k.shortName"
    )
    for name, duration, pid, correlation in rows:
        launch = launches.get((_process(pid), correlation), (None, None))
        kernels.append(Kernel(name or "?", duration / 1e3, *launch))
    return kernels


def _process(global_id: int) -> int:
    """A globalTid is a globalPid with the thread in its low 24 bits."""
    return global_id >> 24


def _from_torch(path: Path) -> tuple[list[Range], list[Kernel]]:
    open_ = gzip.open if path.suffix == ".gz" else open
    with open_(path, "rt") as file:
        try:
            trace: Any = json.load(file)
        except ValueError as error:
            raise ValueError(
                f"{path} is neither an nsys sqlite export nor a torch trace ({error}); "
                "write it with nsys export --type sqlite or profile_decode.py --torch-profiler"
            ) from error
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    ranges, kernels, launches = [], [], {}
    for event in events:
        kind, name, args = event.get("cat"), event.get("name", ""), event.get("args", {})
        if event.get("ph") != "X":
            continue
        begin, duration = float(event["ts"]), float(event.get("dur", 0))
        if kind == "user_annotation" and name.startswith(PREFIX):
            ranges.append(Range(name[len(PREFIX) :], event["tid"], begin, begin + duration))
        elif kind in ("cuda_runtime", "cuda_driver") and "correlation" in args:
            launches[args["correlation"]] = event["tid"], begin
        elif kind == "kernel":
            kernels.append((name, duration, args.get("correlation")))
    return ranges, [Kernel(n, d, *launches.get(c, (None, None))) for n, d, c in kernels]
