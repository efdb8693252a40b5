"""Measurements as rows: one JSON line per variant; tables, plots and ratios are made from them.

A row says what ran, how long it took, what it had to move, the ceiling measured in the same run,
and the baseline of its ratio. Rows of one run share their `Machine`.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..backends.cpu import instruction_set
from ..files import write_text
from .timing import Times

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype in rows and on command lines."""
    return _DTYPE_NAMES[dtype]


@dataclass(frozen=True)
class Machine:
    """Where a run took place."""

    device: str
    isa: str  # instruction set of our CPU kernels, or the compute capability
    threads: int
    load: float  # of the whole machine in the minute before, in busy cores
    commit: str
    versions: dict[str, str]
    clock_note: str = ""

    @classmethod
    def here(cls, device: torch.device | str = "cpu") -> "Machine":
        """The machine of this process, with the load of this moment."""
        device = torch.device(device)
        if device.type == "cuda":
            name, isa = torch.cuda.get_device_name(device), _capability(device)
            clock = "clocks not locked; L2 emptied by reading before each call"
        else:
            name, isa = f"{_cpu_model()}, {os.cpu_count()} cores", _cpu_isa()
            clock = f"{_clock()}, clocks not locked; data evicted before each call"
        return cls(
            name, isa, torch.get_num_threads(), round(_load(), 2), _commit(), _versions(), clock
        )


@dataclass(frozen=True)
class Row:
    """One variant of one benchmark on one shape."""

    bench: str
    shape: str
    backend: str  # ours by its name; a baseline by its form, such as torch-sdpa-grouped
    dtype: str
    us_best: float
    us_p20: float
    us_p50: float
    us_p80: float
    rounds: int
    bytes: int | None = None  # the least that the algorithm must move
    gb_s: float | None = None  # bytes over the best time
    ceiling: str = ""  # what was measured, in the same run
    ceiling_gb_s: float | None = None
    pct_ceiling: float | None = None
    baseline: str = ""  # backend of the row that `ratio` compares with
    ratio: float | None = None  # best of the baseline over the best of this: above 1 is faster
    launches: int | None = None
    checked: bool = False  # the output was compared before timing
    scaled: float = 1.0  # what was timed was multiplied by this, to stand for all layers
    facts: dict[str, Any] = field(default_factory=dict)  # retention, context, predicted_us, ...
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names a row within the rows of one machine."""
        return self.bench, self.shape, self.backend, self.dtype

    @property
    def where(self) -> tuple[str, str, int]:
        """The machine of a row: device, instruction set, threads."""
        found = (self.machine.get(name) for name in ("device", "isa", "threads"))
        device, isa, threads = found
        return str(device), str(isa), int(threads or 0)

    @property
    def noise(self) -> float:
        """The spread of the rounds: p80 over p20, less one."""
        return self.us_p80 / self.us_p20 - 1 if self.us_p20 else 0.0


@dataclass(frozen=True)
class Ceiling:
    """A measured limit, by name."""

    name: str
    gb_s: float


def rows_of(
    bench: str,
    shape: str,
    dtype: torch.dtype,
    times: Mapping[str, Times],
    machine: Machine,
    *,
    baseline: str,
    bytes_: Mapping[str, int] | None = None,
    ceiling: Ceiling | None = None,
    ceilings: Mapping[str, Ceiling] | None = None,
    scaled: Mapping[str, float] | None = None,
    launches: Mapping[str, int | None] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    checked: bool = True,
) -> list[Row]:
    """Make the rows of one interleaved run; `scaled` multiplies times measured on fewer layers.

    `ceilings` are those of single variants, where `ceiling` is not theirs.
    """

    def seconds(name: str) -> float:
        return times[name].best * (scaled or {}).get(name, 1.0)

    made = []
    for name, taken in times.items():
        factor = (scaled or {}).get(name, 1.0)
        moved = (bytes_ or {}).get(name)
        rate = moved / seconds(name) / 1e9 if moved else None
        us = (factor * 1e6 * t for t in (taken.best, taken.p20, taken.p50, taken.p80))
        best, p20, p50, p80 = (round(t, 3) for t in us)
        of = (ceilings or {}).get(name, ceiling)
        limit = of.gb_s if of and rate is not None else None
        apart = {"launch_us": round(1e6 * taken.launch, 3)} if taken.launch else {}
        made.append(
            Row(
                bench, shape, name, dtype_name(dtype), best, p20, p50, p80, len(taken.seconds),
                bytes=moved,
                gb_s=_rounded(rate),
                ceiling=of.name if of else "",
                ceiling_gb_s=_rounded(of.gb_s) if of else None,
                pct_ceiling=_rounded(100 * rate / limit) if rate and limit else None,
                baseline=baseline if baseline in times else "",
                ratio=_rounded(seconds(baseline) / seconds(name)) if baseline in times else None,
                launches=(launches or {}).get(name),
                checked=checked,
                scaled=factor,
                facts=dict((facts or {}).get(name, {})) | apart,
                machine=asdict(machine),
            )
        )  # fmt: skip
    return made


def read(path: str | Path) -> list[Row]:
    """Read a file of JSON lines; fields of a newer version are refused by name."""
    known = {f.name for f in fields(Row)}
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}:{number} is no JSON line ({error}); a results file has one row per line"
            ) from error
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{path}:{number} has unknown fields {', '.join(unknown)}")
        rows.append(Row(**values))
    return rows


def write(path: str | Path, rows: Iterable[Row], *, keep: bool = True) -> None:
    """Write rows; with `keep`, rows of other machines or with other keys stay, in their order."""
    path, fresh = Path(path), {(row.where, row.key): row for row in rows}
    old = read(path) if keep and path.exists() else []
    merged = {(row.where, row.key): row for row in old} | fresh
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in merged.values()))


Column = tuple[str, str]  # heading, format of a Row's field or fact

COLUMNS: tuple[Column, ...] = (
    ("bench", "bench"),
    ("shape", "shape"),
    ("backend", "backend"),
    ("dtype", "dtype"),
    ("cache", "cache"),
    ("best us", "us_best"),
    ("p50 us", "us_p50"),
    ("launch us", "launch_us"),
    ("noise", "noise"),
    ("GB/s", "gb_s"),
    ("% ceiling", "pct_ceiling"),
    ("predicted us", "predicted_us"),
    ("tokens/s", "tokens_s"),
    ("ratio", "ratio"),
    ("against", "baseline"),
)


def table(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> str:
    """Rows as text with aligned columns; a column that no row fills is left out."""
    columns = [one for one in columns if any(_cell(row, one[1]) != "-" for row in rows)]
    cells = [[heading for heading, _ in columns]]
    cells += [[_cell(row, name) for _, name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = {"bench", "shape", "backend", "dtype", "cache", "baseline"}
    return "\n".join(
        "  ".join(
            c.ljust(w) if name in text else c.rjust(w)
            for c, w, (_, name) in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(row: Row, name: str) -> str:
    value = getattr(row, name, None) if hasattr(row, name) else row.facts.get(name)
    if value is None or value == "":
        return "-"
    if name == "noise":
        return f"{100 * value:.0f} %"
    if name == "ratio":
        return f"{value:.2f}x"
    if name == "pct_ceiling":
        return f"{value:.0f}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return str(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _clock() -> str:
    """What kept neighbours out of the times, if anything did."""
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        return "real-time priority"
    return "CPU time of the one thread" if torch.get_num_threads() == 1 else "wall clock"


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _cpu_model() -> str:
    """The CPU's name; with family and model where there are such, as clouds cut names short."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, _, value in pairs}
    name = found.get("model name") or platform.machine()
    if "cpu family" not in found or "model" not in found:
        return name
    return f"{name} (family {found['cpu family']}, model {found['model']})"


def _cpu_isa() -> str:
    try:
        return instruction_set()
    except (ImportError, RuntimeError):
        return "none"


@cache
def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        described = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return described.stdout.strip()


@cache
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": sys.version.split()[0]}
    for name in ("visionpulse", "torch", "triton", "transformers", "onnxruntime"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions
