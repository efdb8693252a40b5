"""Our series on vLLM's own /metrics, and a line in its log.

Workers and the API server are different processes. A worker writes its totals into a file of
prometheus_client's multiprocess format; the API server reads such files of its machine. The folder
is vLLM's own where it has one (several API servers), else one that both derive from the engine's
id. The API server makes it, so an engine without one (`vllm.LLM`) writes nothing.
"""

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter, StatLoggerBase, StatLoggerManager

from ..setting import Setting
from ..stats import Counters, Histogram, Publisher, Totals
from . import facts

# vLLM's own logger prints INFO; those of other packages are silent by default.
logger = init_logger("vllm.visionpulse")
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # set by vLLM where it has several API servers
HELP = {
    "visionpulse:decode_rows": "Rows of decode steps that attended to chosen visual tokens.",
    "visionpulse:dense_rows": "Rows of decode steps that stayed dense, by reason.",
    "visionpulse:visual_tokens": "Visual tokens of the decode rows, at each anchor.",
    "visionpulse:kept_tokens": "Visual tokens that anchors kept of them.",
    "visionpulse:retention": "Share of the visual tokens that an anchor kept, by row and step.",
    "visionpulse:mass": "Visual attention mass at an anchor, by row and step.",
}


class Sample(NamedTuple):
    """One number as prometheus_client stores it."""

    kind: str  # of the series, and the start of the file's name
    series: str
    name: str
    labels: dict[str, str]
    value: float


def samples_of(totals: Totals, labels: Mapping[str, str]) -> Iterator[Sample]:
    """The totals of one worker as samples."""
    counters: list[tuple[str, dict[str, str], float]] = [
        ("decode_rows", {}, totals.sparse_rows),
        ("visual_tokens", {}, totals.visual),
        ("kept_tokens", {}, totals.kept),
    ]
    counters += [("dense_rows", {"reason": why}, n) for why, n in totals.dense_rows.items()]
    for name, more, value in counters:
        series = f"visionpulse:{name}"
        yield Sample("counter", series, f"{series}_total", {**labels, **more}, value)
    for name, histogram in (("retention", totals.retention), ("mass", totals.mass)):
        yield from _histogram(f"visionpulse:{name}", histogram, dict(labels))


def _histogram(series: str, values: Histogram, labels: dict[str, str]) -> Iterator[Sample]:
    yield Sample("histogram", series, f"{series}_sum", labels, values.sum)
    for edge, count in zip((*values.edges, float("inf")), values.counts, strict=True):
        more = {**labels, "le": floatToGoString(edge)}
        yield Sample("histogram", series, f"{series}_bucket", more, count)


def folder_of(vllm_config: Any) -> Path:
    """Where the workers of an engine write; engines of one data-parallel group share it."""
    if SHARED in os.environ:
        return Path(os.environ[SHARED])
    engine = str(vllm_config.instance_id).partition("_dp")[0]
    return Path(tempfile.gettempdir()) / f"visionpulse-{os.getuid()}-{engine}"


def labels_of(vllm_config: Any, engine: int) -> dict[str, str]:
    """The labels that vLLM's own series have."""
    name = vllm_config.model_config.served_model_name
    return {"model_name": name if isinstance(name, str) else name[0], "engine": str(engine)}


def publish(vllm_config: Any, setting: Setting, counters: Counters) -> None:
    """Show the counters of a worker; ranks of one tensor-parallel group count the same, so one.

    Each pipeline stage counts its own anchors, and one of them the rows.
    """
    begin, end = setting.engine.stages[get_pp_group().rank_in_group]
    counters.counts_rows = begin <= setting.anchors[0] < end
    if get_tp_group().rank_in_group == 0:
        Publisher(counters, WorkerFiles(vllm_config).write)


class WorkerFiles:
    """The files of one worker; `write` is what a `Publisher` calls."""

    def __init__(self, vllm_config: Any) -> None:
        self._folder = folder_of(vllm_config)
        parallel = vllm_config.parallel_config  # its rank is 0 in every engine that shares nothing
        self._labels = labels_of(vllm_config, parallel.data_parallel_index)
        self._name = f"visionpulse{parallel.data_parallel_index}-{os.getpid()}"
        self._files: dict[str, MmapedDict] = {}

    def write(self, totals: Totals) -> bool:
        """Write the totals; False where nobody reads them yet."""
        if not self._is_ours():
            return False
        for kind, series, name, labels, value in samples_of(totals, self._labels):
            if kind not in self._files:
                self._files[kind] = MmapedDict(str(self._folder / f"{kind}_{self._name}.db"))
            key = mmap_key(series, name, list(labels), list(labels.values()), HELP[series])
            self._files[kind].write_value(key, value, 0.0)
        return True

    def _is_ours(self) -> bool:
        """A folder whose name others could guess is written only where its owner made it."""
        try:
            return self._folder.stat().st_uid == os.getuid()
        except FileNotFoundError:
            return False


class OurFiles(MultiProcessCollector):  # type: ignore[misc]
    """Reads the workers' files, and in a shared folder no others."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, path=str(folder))
        self.folder = folder

    def collect(self) -> Iterable[Metric]:
        """The series, the workers' numbers added up."""
        files = [str(path) for path in self.folder.glob("*_visionpulse*.db")]
        found: Iterable[Metric] = self.merge(files, accumulate=True)
        return found


def install() -> None:
    """Let vLLM's manager of statistics have ours too, in engines that asked for us; once a process.

    Not as a `vllm.stat_logger_plugins` entry point: vLLM loads those for every engine, and one that
    is there overrules `--disable-log-stats`.
    """
    original = StatLoggerManager.__init__
    if hasattr(original, "visionpulse"):
        return

    @functools.wraps(original)
    def made(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if facts.asked(vllm_config) is not None:
            adapter = PerEngineStatLoggerAdapter(vllm_config, self.engine_indexes, PulseStatLogger)
            self.stat_loggers.append(adapter)

    made.visionpulse = True  # type: ignore[attr-defined]
    StatLoggerManager.__init__ = made


class PulseStatLogger(StatLoggerBase):  # type: ignore[misc]
    """One for each engine, in the API server."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        folder = folder_of(vllm_config)
        if SHARED not in os.environ:
            if not folder.exists():
                folder.mkdir(mode=0o700)
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
                REGISTRY.register(OurFiles(folder))
            elif folder.stat().st_uid != os.getuid():
                raise PermissionError(
                    f"{folder} belongs to another user; set TMPDIR to another folder"
                )
        rank = vllm_config.parallel_config._api_process_rank
        self._files: OurFiles | None = (
            OurFiles(folder) if rank in (-1, 0) else None
        )  # one server writes the line
        self._engine = str(engine_index)
        self._last = self._read() if self._files else {}
        self._at = time.monotonic()

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what vLLM records is not ours."""

    def log_engine_initialized(self) -> None:
        """Nothing."""

    def log(self) -> None:
        """One line, where something was decoded since the last one."""
        if self._files is None:
            return
        now, since = self._read(), time.monotonic() - self._at
        line = log_line({name: n - self._last.get(name, 0.0) for name, n in now.items()}, since)
        self._last, self._at = now, time.monotonic()
        if line:
            logger.info("Engine %s: %s", self._engine.zfill(3), line)

    def _read(self) -> dict[str, float]:
        assert self._files is not None
        found = {}
        for metric in self._files.collect():
            for sample in metric.samples:
                if sample.labels.get("engine") == self._engine and "le" not in sample.labels:
                    reason = sample.labels.get("reason", "")
                    found[sample.name.removeprefix("visionpulse:") + reason] = sample.value
        return found


def log_line(since: Mapping[str, float], seconds: float) -> str:
    """What was decoded in a period, in words; empty where nothing was."""
    dense = {
        name.removeprefix("dense_rows_total"): round(count)
        for name, count in since.items()
        if name.startswith("dense_rows_total") and count > 0
    }
    sparse = since.get("decode_rows_total", 0)
    parts = []
    if sparse:
        visual, kept = since.get("visual_tokens_total", 0), since.get("kept_tokens_total", 0)
        picked = since.get("mass_count", 0) or 1
        mass = since.get("mass_sum", 0) / picked
        parts.append(
            f"{sparse:.0f} sparse decode rows, {100 * kept / max(visual, 1):.2f} % of "
            f"{visual / picked:.0f} visual tokens kept, mean mass {mass:.2f}"
        )
    if dense:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(dense.items()))
        parts.append(f"{sum(dense.values())} dense rows ({why})")
    return f"visionpulse, {seconds:.0f} s: {'; '.join(parts)}" if parts else ""
