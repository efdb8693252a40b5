"""From a profile to one table: how often each stage ran, and the time that it took.

`stages(path)` reads what `nsys export --type sqlite` writes, and the Chrome trace of torch's own
profiler. A kernel belongs to the innermost range `visionpulse::<stage>` around its launch. One that
a CUDA graph launched has no such range; its name says the stage: `vp_<stage>_...` in CUDA,
`_<stage>_kernel` in Triton.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from profile_ranges import Kernel, Range, read

OTHER = "(other)"
_STAGE = re.compile(r"\b(?:vp)?_(score|select|attend)(?:_|\b)")


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
