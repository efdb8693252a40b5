"""Anchor, tau and bounds for a model, from a few dense answers to the user's own inputs.

1. The model answers densely, and every layer's attention is observed.
2. For each layer as the anchor: how much of the attention of the layers after it would be lost, and
   how many tokens a step needs to lose little. The bounds come from that need, and tau is the one
   whose clamped mass follows it best.
3. The best candidates run through the patch along the dense answers: how often it writes another
   token, and how far its distribution is. The setting that keeps fewest tokens among those that do
   as well as the best is suggested.
4. That setting runs once more under the schedules that prune more layers. Whether a model bears
   one is a fact of the model: where the layers before the anchor look things up themselves,
   `lookback` blinds them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import PRESETS, PulseConfig, config_data
from ..figures import figure, save_figure
from ..files import write_text
from ..models import patch
from .correlation import pearson
from .observe import TAUS, Observation, observe

LOST = 0.02  # attention to the picture that the layers after the anchor may lose in a step
ANCHORS = 3  # layers that are tried through the patch
BEARS = 0.98  # share of steps that write the dense model's token, below which a setting is no use
GRID = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.30, 0.50)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One setting, run along the dense answers."""

    config: PulseConfig
    name: str
    steps: int  # decode steps compared
    differs: int  # steps in which the most likely token is another
    distance: float  # mean Kullback-Leibler divergence of dense from sparse, nats per step
    retention: float  # mean share of visual tokens kept

    @property
    def agreement(self) -> float:
        """Share of steps that write the dense model's token."""
        return 1 - self.differs / self.steps

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the agreement; steps of one answer are not independent."""
        z2, n, p = 1.96**2, self.steps, self.agreement
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, eq=False)
class Calibration:
    """A suggestion, with what it rests on."""

    config: PulseConfig
    trials: list[Trial]
    lost: dict[int, float]  # by anchor: mean attention lost at 5 % retention
    follows: dict[float, float]  # by tau: r of the clamped mass with the need, at the chosen anchor
    seen: Observation = field(repr=False)
    remarks: list[str] = field(default_factory=list)
    schedules: list[Trial] = field(default_factory=list)  # the suggestion under other schedules

    @property
    def chosen(self) -> Trial:
        """The trial of the suggested setting."""
        return next(trial for trial in self.trials if trial.config == self.config)

    @property
    def is_sure(self) -> bool:
        """Whether the inputs were enough to rely on it."""
        return not self.remarks

    @property
    def breaking(self) -> list[Trial]:
        """The schedules under which the model writes something else: not to be used on it."""
        low, _ = self.chosen.interval
        return [t for t in self.schedules if t.agreement < BEARS and t.interval[1] < low]

    def report(self) -> str:
        """Print the suggestion and the trials as text."""
        low, high = self.chosen.interval
        c = self.config
        verdict = "There were enough steps to rely on it."
        if not self.is_sure:
            verdict = "Do not rely on it yet: " + "; ".join(self.remarks) + "."
        lines = [
            f"suggested: anchor {c.anchor}, tau {c.tau:g}, ratio {c.ratio[0]:g} .. {c.ratio[1]:g}",
            f"It keeps {100 * self.chosen.retention:.2f} % of the visual tokens, and writes the "
            "dense",
            f"model's token in {100 * self.chosen.agreement:.2f} % of {self.chosen.steps} steps "
            f"(95 % interval: {100 * low:.2f} to {100 * high:.2f}).",
            verdict,
            "",
            f"{'setting':<34} {'kept %':>7} {'agrees %':>9} {'distance':>9}",
        ]
        for trial in sorted(self.trials, key=lambda t: t.retention):
            lines.append(("*" if trial.config == self.config else " ") + _line(trial))
        if self.schedules:
            lines += ["", "the suggestion under other schedules:"]
            lines += [
                f" {_line(trial)}{' breaks this model' if trial in self.breaking else ''}"
                for trial in self.schedules
            ]
        return "\n".join(lines)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the suggested setting, with what it rests on, as JSON; `patch` takes the file."""
        about = {"trials": _data(self.trials), "sure": self.is_sure, "remarks": self.remarks}
        about |= {
            "schedules": _data(self.schedules),
            "breaking": [trial.name for trial in self.breaking],
        }
        about |= {"lost": self.lost, "follows": self.follows}
        known = {"config": config_data(self.config), "about": about}
        return write_text(path, json.dumps(known, indent=1) + "\n")

    def plot(self, path: str | PathLike[str]) -> Path:
        """Draw error against retention of every setting that was tried."""
        drawing = figure(figsize=(6.4, 4.2))
        axis = drawing.subplots()
        floor = min((t.distance for t in self.trials if t.distance > 0), default=1e-9)
        for trial in self.trials:
            is_chosen = trial.config == self.config
            axis.scatter(
                100 * trial.retention, max(trial.distance, floor), s=70 if is_chosen else 22,
                color="#d9480f" if is_chosen else "#3b5b8c", zorder=3 if is_chosen else 2,
            )  # fmt: skip
            if is_chosen or trial.name in PRESETS:
                axis.annotate(trial.name, (100 * trial.retention, max(trial.distance, floor)),
                              fontsize=7, xytext=(5, 4), textcoords="offset points")  # fmt: skip
        axis.set_yscale("log")
        axis.set_xlabel("visual tokens kept, %")
        axis.set_ylabel("distance from dense, nats a step")
        save_figure(drawing, path)
        return Path(path)


def _line(trial: Trial) -> str:
    return (
        f"{trial.name:<33} {100 * trial.retention:7.2f} "
        f"{100 * trial.agreement:9.2f} {trial.distance:9.5f}"
    )


def _data(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    return [
        {f.name: getattr(t, f.name) for f in fields(t)} | {"config": config_data(t.config)}
        for t in trials
    ]


def calibrate(
    model: Any,
    inputs: "Mapping[str, Any] | Sequence[Mapping[str, Any]]",
    *,
    start: PulseConfig | None = None,
    max_new_tokens: int = 64,
    tick: Callable[[str, int, int], None] = lambda what, done, total: None,
    **options: Any,
) -> Calibration:
    """Suggest a setting for this model from `inputs`, each what `model.generate` takes.

    `start` is a setting to compare with; its other fields (score, mass, ...) are kept. `options` go
    to `generate`. `tick(what, done, total)` is called as the work proceeds.
    """
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    base = replace(start or PulseConfig(), schedule="paper", budget="dynamic")
    seen = observe(
        model, batches, max_new_tokens=max_new_tokens, taus=TAUS, ratios=GRID,
        tick=lambda done: tick("dense answers", done, len(batches)), **options,
    )  # fmt: skip
    lost = {layer: float(_lost(seen, layer)[:, GRID.index(0.05)].mean()) for layer in _able(seen)}
    if not lost:
        raise ValueError("the model has one full-attention layer, so no layer could follow it")
    candidates = _candidates(seen, lost, base)
    if start is not None:
        candidates.setdefault("start", start)
    forced = ForcedAnswers(model, batches, seen, options)

    def run(what: str, settings: Mapping[str, PulseConfig]) -> list[Trial]:
        trials = []
        for done, (name, config) in enumerate(settings.items(), 1):
            trials.append(forced.run(name, config))
            tick(what, done, len(settings))
        return trials

    trials = run("settings", candidates)
    best = _best([t for t in trials if t.name != "start"])
    follows = {t: _follows(seen, int(_anchor(best.config)), t, best.config.ratio) for t in TAUS}
    schedules = run("schedules", _schedules(seen, best.config))
    remarks = _remarks(seen, trials, best)
    return Calibration(best.config, trials, lost, follows, seen, remarks, schedules)


def _able(seen: Observation) -> tuple[int, ...]:
    """Layers that can be an anchor: some layer follows them."""
    return seen.layers[:-1]


def _anchor(config: PulseConfig) -> int:
    assert isinstance(config.anchor, int)  # every candidate names one
    return config.anchor


def _lost(seen: Observation, anchor: int) -> Floats:
    """Attention to visual tokens that the layers after the anchor lose, mean of them: [E, GRID]."""
    i = seen.index_of(anchor)
    mass = seen.mass_mean[:, i + 1 :, None]  # [E, followers, 1]
    lost: Floats = (mass * (1 - seen.captured[:, i, i + 1 :])).mean(1).astype(np.float64)
    return lost


def _need(seen: Observation, anchor: int) -> Floats:
    """The smallest ratio of the grid that loses at most LOST in a step, else the largest: [E]."""
    enough = _lost(seen, anchor) <= LOST  # [E, GRID]
    first = np.where(enough.any(1), enough.argmax(1), len(GRID) - 1)
    need: Floats = np.asarray(GRID)[first]
    return need


def _follows(seen: Observation, anchor: int, tau: float, ratio: tuple[float, float]) -> float:
    """How well the clamped mass follows the need: Pearson's r, 0 where the mass is always one."""
    mass = seen.mass[:, seen.index_of(anchor), seen.taus.index(tau)]
    r = pearson(np.clip(mass, *ratio), _need(seen, anchor))
    return 0.0 if math.isnan(r) else r


def _candidates(
    seen: Observation, lost: dict[int, float], base: PulseConfig
) -> dict[str, PulseConfig]:
    """Settings worth a run: presets and bounds by need, at the anchors that lose least."""
    candidates = {}
    for anchor in sorted(lost, key=lambda layer: lost[layer])[:ANCHORS]:
        need = _need(seen, anchor)
        quiet, busy = (float(np.quantile(need, q)) for q in (0.1, 0.95))
        bounds = {(quiet, max(busy, quiet)), (min(quiet, 0.01), max(busy, 0.05))}
        for ratio in sorted(bounds):
            taus = sorted(TAUS, key=lambda t: -_follows(seen, anchor, t, ratio))[:2]
            for tau in taus:
                config = base.updated(anchor=anchor, tau=tau, ratio=ratio)
                candidates[f"anchor {anchor} tau {tau:g} {ratio[0]:g}..{ratio[1]:g}"] = config
        for name, preset in PRESETS.items():
            if preset.schedule == "dense":
                continue
            config = base.updated(anchor=anchor, tau=preset.tau, ratio=preset.ratio)
            if config not in candidates.values():
                candidates[f"anchor {anchor} {name}"] = config
    return candidates


def _schedules(seen: Observation, config: PulseConfig) -> dict[str, PulseConfig]:
    """A setting under the schedules that prune more layers, or choose more often."""
    anchor, able = _anchor(config), _able(seen)
    settings = {f"lookback, anchor {anchor}": config.updated(schedule="lookback")}
    earlier = [layer for layer in able if layer < anchor][-1:]
    for layer in earlier:
        settings[f"lookback, anchor {layer}"] = config.updated(schedule="lookback", anchor=layer)
    later = [layer for layer in able if layer > anchor]
    if later:
        second = later[len(later) // 2]
        settings[f"anchors {anchor} and {second}"] = config.updated(anchor=(anchor, second))
    return settings


def _best(trials: Sequence[Trial]) -> Trial:
    """Fewest tokens among the settings that agree as well as the best, within its interval."""
    top = max(trials, key=lambda t: (t.agreement, -t.distance))
    good = [t for t in trials if t.agreement >= top.interval[0]]
    # a hundredth of a nat is far above rounding and far below a changed mind
    close = [t for t in good if t.distance <= max(2 * top.distance, 0.01)]
    return min(close, key=lambda t: (t.retention, t.distance))


def _remarks(seen: Observation, trials: Sequence[Trial], best: Trial) -> list[str]:
    remarks = []
    if best.steps < 300:
        remarks.append(f"only {best.steps} steps were seen; 300 or more say something")
    if best.agreement < BEARS:
        remarks.append(
            f"the best setting writes another token in {100 * (1 - best.agreement):.1f} % of steps"
        )
    if seen.mass_mean.max() < 0.01:
        remarks.append("the model hardly looks at the picture in these answers")
    return remarks


class ForcedAnswers:
    """Runs settings along the dense answers and compares what the model would write."""

    def __init__(
        self, model: Any, batches: Sequence[Mapping[str, Any]], seen: Observation, options: Any
    ) -> None:
        self.model, self.batches, self.options = model, batches, options
        self.answers: list[list[tuple[int, ...]]] = []
        rows = iter(seen.answers)
        for batch in batches:
            self.answers.append([next(rows) for _ in range(len(batch["input_ids"]))])
        self.dense = [made for made in self._logits()]  # per input [B, T, vocabulary]

    def _logits(self) -> Iterator[Tensor]:
        for batch, answers in zip(self.batches, self.answers, strict=True):
            yield along(self.model, batch, answers, self.options)

    def run(self, name: str, config: PulseConfig) -> Trial:
        """Compare one setting with the dense answers."""
        steps = differs = 0
        distance = 0.0
        with patch(self.model, config) as session:
            for dense, sparse, answers in zip(
                self.dense, self._logits(), self.answers, strict=True
            ):
                lengths = torch.tensor([len(answer) for answer in answers])
                live = torch.arange(1, dense.shape[1] + 1) < lengths[:, None]  # [B, T - 1]
                live = live.to(dense.device)
                apart = (dense.exp() * (dense - sparse).nan_to_num(0.0)).sum(-1)
                differs += int((dense.argmax(-1) != sparse.argmax(-1))[live].sum())
                distance += float(apart[live].clamp(min=0).sum())
                steps += int(live.sum())
            retention = session.stats.retention.mean
        return Trial(config, name, steps, differs, distance / max(steps, 1), retention)


def along(
    model: Any, batch: Mapping[str, Any], answers: Sequence[tuple[int, ...]], options: Any
) -> Tensor:
    """Log-probabilities of every position of the answers but the first, [B, T - 1, vocabulary]."""
    from transformers import LogitsProcessorList

    path, size = _padded(answers), batch["input_ids"].shape[1]
    logits: list[Tensor] = []

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        at = ids.shape[1] - size
        if at:
            logits.append(scores.float().log_softmax(-1))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, path[:, at : at + 1].to(scores.device), 0.0)

    model.generate(
        **batch, **(options | {"do_sample": False}), max_new_tokens=path.shape[1],
        logits_processor=LogitsProcessorList([force]),
    )  # fmt: skip
    return torch.stack(logits, 1)


def _padded(answers: Sequence[tuple[int, ...]]) -> Tensor:
    """Answers as one tensor [B, T], each repeated at its end."""
    longest = max(len(answer) for answer in answers)
    rows = [list(answer) + [answer[-1]] * (longest - len(answer)) for answer in answers]
    return torch.tensor(rows)
