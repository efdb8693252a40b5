"""From a profile to one table: how often each stage ran, and the time that it took.

`stages(path)` reads what `nsys export --type sqlite` writes, and the Chrome trace of torch's own
profiler. A kernel belongs to the innermost range `visionpulse::<stage>` around its launch. One that
a CUDA graph launched has no such range; its name says the stage: `vp_<stage>_...` in CUDA,
`_<stage>_kernel` in Triton.
"""

import gzip
import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PREFIX = "visionpulse::"
OTHER = "(other)"
_STAGE = re.compile(r"\b(?:vp)?_(score|select|attend)(?:_|\b)")
_SQLITE = b"SQLite format 3\x00"
_PUSH_POP = 59  # NVTX_EVENTS.eventType of a range that one thread pushed and popped


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


@dataclass
class Stage:
    """One line of the table."""

    name: str
    calls: int = 0
    host_us: float = 0.0  # in the range, less the ranges inside it
    kernels: int = 0
    device_us: float = 0.0
    kernel_names: set[str] = field(default_factory=set)


def stages(path: str | Path) -> list[Stage]:
    """Read a profile into stages, longest device (else host) time first."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(len(_SQLITE))
    read = _from_nsys if head == _SQLITE else _from_torch
    return summed(*read(path))


def summed(ranges: Sequence[Range], kernels: Iterable[Kernel]) -> list[Stage]:
    """Assign every kernel and every microsecond of the host to one stage."""
    table: dict[str, Stage] = {}

    def stage(name: str) -> Stage:
        return table.setdefault(name, Stage(name))

    for inner, own in _own_times(ranges):
        line = stage(inner.name)
        line.calls += 1
        line.host_us += own
    by_thread: dict[int, list[Range]] = defaultdict(list)
    for one in ranges:
        by_thread[one.thread].append(one)
    for kernel in kernels:
        line = stage(_stage_of(kernel, by_thread))
        line.kernels += 1
        line.device_us += kernel.duration
        line.kernel_names.add(kernel.name)
    return sorted(table.values(), key=lambda s: (-s.device_us, -s.host_us, s.name))


def table(lines: Sequence[Stage], steps: int = 1) -> str:
    """Print stages as text, per step."""
    device = sum(line.device_us for line in lines)
    host = sum(line.host_us for line in lines)
    whole = device or host or 1.0
    rows = [("stage", "calls", "host us", "kernels", "device us", "share")]
    for line in lines:
        share = (line.device_us if device else line.host_us) / whole
        rows.append(
            (
                line.name,
                f"{line.calls / steps:g}",
                f"{line.host_us / steps:.1f}",
                f"{line.kernels / steps:g}",
                f"{line.device_us / steps:.1f}",
                f"{100 * share:.1f} %",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _own_times(ranges: Sequence[Range]) -> Iterable[tuple[Range, float]]:
    """Each range with its own time: less that of the ranges directly inside it."""
    inside: dict[int, float] = defaultdict(float)
    order = sorted(range(len(ranges)), key=lambda i: (ranges[i].begin, -ranges[i].end))
    open_: dict[int, list[int]] = defaultdict(list)  # per thread, the outermost first
    for i in order:
        stack = open_[ranges[i].thread]
        while stack and ranges[stack[-1]].end <= ranges[i].begin:
            stack.pop()
        if stack:
            inside[stack[-1]] += ranges[i].end - ranges[i].begin
        stack.append(i)
    return [(one, one.end - one.begin - inside[i]) for i, one in enumerate(ranges)]


def _stage_of(kernel: Kernel, by_thread: dict[int, list[Range]]) -> str:
    best: Range | None = None
    if kernel.launched is not None and kernel.thread is not None:
        for one in by_thread.get(kernel.thread, ()):
            holds = one.begin <= kernel.launched <= one.end
            if holds and (best is None or one.end - one.begin < best.end - best.begin):
                best = one
    if best is not None and best.name != "step":
        return best.name
    named = _STAGE.search(kernel.name)
    return named.group(1) if named else OTHER


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
