"""`visionpulse bench`: what would VisionPulse gain on this machine, for this model?

Measures the three kinds of layer and torch's two forms of the dense one at several contexts, the
machine's ceilings in the same run, and adds up decode steps. Attention is measured; the time of
the weights is predicted from the ceiling, and marked so.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .analysis import cost, speed_plots
from .baselines import sdpa
from .config import PulseConfig
from .config import resolve as resolve_config
from .ops import attend, decode
from .schedule import Role
from .structs import Selection
from .testing import rows as rows_
from .testing.ceilings import Ceilings
from .testing.layers import Layers, Shape
from .testing.timing import Times, interleaved

PLAIN, TODAY = "torch-sdpa-grouped", "torch-sdpa-per-head"
TITLES = {
    TODAY: "torch, as models call it",
    PLAIN: "torch, best form",
    "dense": "ours, dense",
    "anchor": "ours, anchor",
    "follower": "ours, follower",
}
_ROLES = {"dense": Role.DENSE, "anchor": Role.ANCHOR, "follower": Role.FOLLOWER}
MOST_ROUNDS, LEAST_ROUNDS = 15, 3


@dataclass(frozen=True)
class Measured:
    """One context: seconds of each kind of layer, and the ceilings beside them."""

    shape: Shape
    times: dict[str, Times]
    ceilings: cost.Ceilings
    read: rows_.Ceiling

    def best(self, name: str) -> float:
        """Seconds of the fastest round."""
        return self.times[name].best


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    options = _options(argv)
    try:
        decoder = cost.decoder_of(options.model)
        config = resolve_config(options.config).updated(schedule=options.schedule)
        shapes = _shapes(options, decoder, config)
    except ValueError as error:
        print(f"visionpulse bench: {error}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), rows_.DTYPES[options.dtype]
    bar = Bar(sys.stderr if options.progress and sys.stderr.isatty() else None)
    machine = rows_.Machine.here(device)
    measured = []
    for i, shape in enumerate(shapes):
        seconds = options.seconds / len(shapes)
        show = bar.part(i / len(shapes), 1 / len(shapes), f"{speed_plots.short(shape.visual)} keys")
        measured.append(_measure(shape, dtype, device, config, seconds, show))
    bar.close()
    report = Report(decoder, config, dtype, machine, measured, options)
    print(report.text())
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(report.data(), indent=1) + "\n")
    written = [folder / "bench.json"]
    if options.plots:
        try:
            written += report.plots(folder)
        except ImportError as error:
            print(f"\nno plots: {error}")
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "visionpulse bench", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    known = ", ".join(cost.KNOWN)
    add("--model", default="qwen3-vl-4b", help=f"{known}, or a path to a config.json")
    add("--contexts", default="4k,8k,16k,32k", help="visual tokens, by comma; k is 1024")
    add("--text", type=int, default=256, help="text tokens in the context")
    add("--batch", type=int, default=1)
    add("--dtype", default="bf16", choices=list(rows_.DTYPES))
    add("--config", default="10pct", help="name of a preset")
    add("--schedule", default="paper", help="paper, lookback or per_layer")
    add("--retention", type=float, help="share kept; by default the largest that the preset allows")
    add("--seconds", type=float, default=60, help="about how long to measure")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=0, help="of torch on the CPU; 0 leaves them as they are")
    add("--out", default="visionpulse-bench", help="folder for bench.json and the plots")
    add("--no-plots", dest="plots", action="store_false")
    add("--no-progress", dest="progress", action="store_false")
    return parser.parse_args(argv)


def _tokens(text: str) -> int:
    number = text.strip().lower().removesuffix("k")
    if not number.isdigit() or int(number) < 1:
        raise ValueError(f"a context is a number of tokens such as 8k or 5000, got {text!r}")
    return int(number) * (1024 if text.strip().lower().endswith("k") else 1)


def _shapes(options: argparse.Namespace, decoder: cost.Decoder, config: PulseConfig) -> list[Shape]:
    retention = config.ratio[1] if options.retention is None else options.retention
    if not 0 < retention <= 1:
        raise ValueError(f"--retention must be above 0 and at most 1, got {retention}")
    contexts = sorted({_tokens(text) for text in options.contexts.split(",")})
    return [
        Shape(
            f"b{options.batch}-{speed_plots.short(visual)}", options.batch, visual, options.text,
            decoder.heads, decoder.kv_heads, decoder.head_dim, retention,
        )
        for visual in contexts
    ]  # fmt: skip


def _measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    config: PulseConfig,
    seconds: float,
    progress: Callable[[float], None],
) -> Measured:
    """Time the kinds of layer in one interleaved run of about `seconds`, inputs included."""
    begin = time.perf_counter()
    layers = Layers.make(shape, dtype, device, layers=8)
    exactly = config.updated(ratio=(shape.retention, shape.retention), anchor=None)
    variants, selection = _variants(layers, exactly)
    _check(layers, selection)
    ceilings = Ceilings(device, dtype, shape.head_dim * dtype.itemsize)
    variants |= ceilings.variants()
    once = time.perf_counter()
    interleaved(variants, 1, warmup=0, device=device)
    round_ = time.perf_counter() - once
    left = seconds - (time.perf_counter() - begin)
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(left / round_) - 1))
    times = interleaved(
        variants, rounds, device=device, on_round=lambda n: progress((n + 1) / (rounds + 1))
    )
    read, gather = ceilings.read(times), ceilings.gather(times)
    found = cost.Ceilings(read.gb_s * 1e9, ceilings.compute(times), gather.gb_s * 1e9)
    return Measured(shape, times, found, read)


def _variants(
    layers: Layers, config: PulseConfig
) -> tuple[dict[str, Callable[[int], object]], Selection]:
    visual = layers.visual
    _, selection = decode(*layers.at(0), visual, config)
    return {
        TODAY: lambda turn: sdpa.per_head(*layers.at(turn)),
        PLAIN: lambda turn: sdpa.grouped(*layers.at(turn)),
        "dense": lambda turn: attend(*layers.at(turn)),
        "anchor": lambda turn: decode(*layers.at(turn), visual, config),
        "follower": lambda turn: attend(*layers.at(turn), visual, selection),
    }, selection


def _check(layers: Layers, selection: Selection) -> None:
    """Ours, dense and as a follower, near torch's own form before anything is timed."""
    q, kv = layers.at(1)
    count = int(selection.counts[0])
    keep = ~layers.visual.mask(kv.capacity)
    for b in range(kv.batch):
        keep[b, selection.indices[b, :count].long()] = True
    kept = keep.nonzero()[:, 1].view(kv.batch, -1)
    pairs = {
        "dense": (attend(q, kv), sdpa.grouped(q, kv)),
        "follower": (attend(q, kv, layers.visual, selection), sdpa.gathered(q, kv, kept)),
    }
    for name, (ours, torchs) in pairs.items():
        error = (ours.float() - torchs.float()).abs().max().item()
        allowed = 16 * torch.finfo(q.dtype).eps * torchs.float().abs().max().item()
        if not error <= allowed:
            raise RuntimeError(
                f"our {name} output differs from torch's by {error:.2e}, allowed {allowed:.2e}; "
                "timings of a wrong answer are worth nothing: please report this"
            )


class Report:
    """What was measured, added up to steps: as text, data and plots."""

    def __init__(
        self,
        decoder: cost.Decoder,
        config: PulseConfig,
        dtype: torch.dtype,
        machine: rows_.Machine,
        measured: Sequence[Measured],
        options: argparse.Namespace,
    ) -> None:
        self.decoder, self.config, self.dtype = decoder, config, dtype
        self.machine, self.measured, self.options = machine, measured, options
        # one machine: the best of all contexts, so that a busy minute does not lower a roof
        every = [one.ceilings for one in measured]
        self.roof = cost.Ceilings(
            max(c.read for c in every),
            max(c.compute for c in every),
            max(c.gather or 0.0 for c in every),
        )
        self.counts = cost.role_counts(config, decoder.is_full)
        self.full = sum(decoder.is_full)
        self.steps = [self._step(one) for one in measured]

    def _step(self, one: Measured) -> dict[str, Any]:
        """One step at one context, in seconds."""
        shape = one.shape
        step = cost.decode_step(
            self.decoder, shape.text, shape.visual, rows=shape.rows, config=self.config,
            retention=shape.retention, itemsize=self.dtype.itemsize,
        )  # fmt: skip
        sparse = sum(self.counts[role] * one.best(name) for name, role in _ROLES.items())
        weights = cost.predict(step.weights, self.roof)
        return {
            "visual": shape.visual,
            "kept": shape.kept,
            "attention": {
                TODAY: self.full * one.best(TODAY),
                PLAIN: self.full * one.best(PLAIN),
                "dense": self.full * one.best("dense"),
                self.config.schedule: sparse,
            },
            "predicted_attention": cost.predict(step.attention, self.roof),
            "predicted_weights": weights,
        }

    def text(self) -> str:
        """The answer as a table."""
        schedule, options = self.config.schedule, self.options
        heads = (
            "visual", "kept", "torch, as called", "torch, best", "ours dense", f"ours {schedule}",
            "predicted", "weights*", "attention", "step*",
        )  # fmt: skip
        lines: list[tuple[str, ...]] = [heads]
        for step in self.steps:
            spent, weights = step["attention"], step["predicted_weights"]
            ours = spent[schedule]
            gains = [spent[form] / ours for form in (TODAY, PLAIN)]
            steps = [(weights + spent[form]) / (weights + ours) for form in (TODAY, PLAIN)]
            values = (*spent.values(), step["predicted_attention"], weights)
            lines.append(
                (
                    speed_plots.short(step["visual"]), str(step["kept"]),
                    *(f"{1e3 * v:.1f} ms" for v in values),
                    " / ".join(f"{gain:.1f}x" for gain in gains),
                    " / ".join(f"{gain:.2f}x" for gain in steps),
                )
            )  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        table = "\n".join(
            "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines
        )
        machine, roof = self.machine, self.roof
        rounds = [len(one.times["dense"].seconds) for one in self.measured]
        return (
            f"\n{options.model}, {self.decoder.layers} layers, batch {options.batch}, "
            f"{options.dtype}, {options.text} text tokens, schedule {schedule!r}\n"
            f"{machine.device}, {machine.isa}, {machine.threads} thread(s), "
            f"load {machine.load:g} before the run\n"
            f"ceilings: {self.measured[0].read.name} {roof.read / 1e9:.1f} GB/s, "
            f"torch's gather {(roof.gather or 0) / 1e9:.1f} GB/s, "
            f"product {roof.compute / 1e9:,.0f} GFLOP/s\n\n"
            f"Attention of one decode step, bests of {min(rounds)} to {max(rounds)} rounds; the "
            f"gains are against torch as models call it / in its best form.\n{table}\n"
            "* the weights' time is predicted from the read ceiling, not measured; "
            "'predicted' is the sparse attention at the ceilings."
        )

    def rows(self) -> list[rows_.Row]:
        """The layers as rows."""
        made = []
        for one in self.measured:
            shape, problem = one.shape, one.shape.cost(self.dtype)
            work = {
                TODAY: cost.dense(problem), PLAIN: cost.dense(problem),
                "dense": cost.dense(problem), "anchor": self._anchor(one),
                "follower": cost.attend(problem, shape.kept),
            }  # fmt: skip
            made += rows_.rows_of(
                "layer", shape.name, self.dtype, {name: one.times[name] for name in work},
                self.machine, baseline=PLAIN, ceiling=one.read,
                bytes_={name: w.bytes for name, w in work.items()},
                facts={n: {"visual": shape.visual, "flops": w.flops} for n, w in work.items()},
            )  # fmt: skip
        return made

    def _anchor(self, one: Measured) -> cost.Work:
        return cost.decode(one.shape.cost(self.dtype), one.shape.kept, self.config.anchor_output)

    def data(self) -> dict[str, Any]:
        """The answer as data."""
        return {
            "model": self.options.model,
            "decoder": asdict(self.decoder),
            "config": {k: str(v) for k, v in vars(self.config).items()},
            "steps_seconds": self.steps,
            "rows": [asdict(row) for row in self.rows()],
        }

    def plots(self, folder: Path) -> list[Path]:
        """Draw the roofline and the times by context."""
        where = f"{self.machine.device}, {self.options.dtype}, batch {self.options.batch}"
        points = [
            speed_plots.Point(
                TITLES[row.backend], speed_plots.short(row.facts["visual"]), row.facts["flops"],
                float(row.bytes or 1), row.us_best / 1e6,
            )
            for row in self.rows()
        ]  # fmt: skip
        roof = speed_plots.Roof(*self.roof)
        names = {**TITLES, self.config.schedule: f"ours, {self.config.schedule!r}"}
        series = {
            names[name]: {step["visual"]: step["attention"][name] for step in self.steps}
            for name in self.steps[0]["attention"]
        }
        written = []
        for ending in ("png", "svg"):
            path = folder / f"roofline.{ending}"
            speed_plots.roofline(
                points, roof, path, title="One layer of decoding, under the roofs", note=where
            )
            written.append(path)
            path = folder / f"latency.{ending}"
            speed_plots.by_context(
                series, path, title=f"Attention of one decode step, {self.full} layers",
                weights=self.steps[-1]["predicted_weights"], note=where,
            )  # fmt: skip
            written.append(path)
        return written


class Bar:
    """A progress bar on one line of a terminal; silent without one."""

    WIDTH = 30

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def part(self, start: float, width: float, label: str) -> Callable[[float], None]:
        """What shows a share of one part of the work."""
        return lambda done: self.show(start + done * width, label)

    def show(self, share: float, label: str) -> None:
        """Draw the share that is done."""
        if self.stream is None:
            return
        full = round(self.WIDTH * share)
        bar = "#" * full + "." * (self.WIDTH - full)
        self.stream.write(f"\r[{bar}] {100 * share:3.0f} %  {label}\033[K")
        self.stream.flush()

    def close(self) -> None:
        """Leave an empty line."""
        if self.stream is not None:
            self.stream.write("\r\033[K")
            self.stream.flush()
