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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import PRESETS, PulseConfig, config_data
from ..figures import figure, save_figure
from ..files import write_text
from ..models import patch
from .correlation import pearson
from .float8 import Float8Trial, float8_trial
from .observe import TAUS, Observation, observe
from .trials import BEARS, ForcedAnswers, Trial

LOST = 0.02  # attention to the picture that the layers after the anchor may lose in a step
ANCHORS = 3  # layers that are tried through the patch
GRID = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.30, 0.50)
Floats = NDArray[np.float64]


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
    float8: Float8Trial | None = None  # and with a cache of 8 bits, where it was asked for

    @property
    def chosen(self) -> Trial:
        """The trial of the suggested setting."""
        return next(t for t in self.trials if self._is_chosen(t))

    def _is_chosen(self, trial: Trial) -> bool:
        """Settings are tried without 8 bits."""
        return trial.config == self.config.updated(cache="model")

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
            lines.append(("*" if self._is_chosen(trial) else " ") + _line(trial))
        if self.schedules:
            lines += ["", "the suggestion under other schedules:"]
            lines += [
                f" {_line(trial)}{' breaks this model' if trial in self.breaking else ''}"
                for trial in self.schedules
            ]
        if self.float8 is not None:
            lines += ["", "the suggestion with a cache of 8 bits:", f" {_line(self.float8.trial)}"]
            lines += ["", self.float8.says(self.chosen)]
        return "\n".join(lines)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the suggested setting, with what it rests on, as JSON; `patch` takes the file."""
        about = {"trials": _data(self.trials), "sure": self.is_sure, "remarks": self.remarks}
        about |= {
            "schedules": _data(self.schedules),
            "breaking": [trial.name for trial in self.breaking],
        }
        about |= {"lost": self.lost, "follows": self.follows}
        if self.float8 is not None:
            shares = {f.name: getattr(self.float8, f.name) for f in fields(self.float8)}
            about["float8"] = shares | {"trial": _data([self.float8.trial])[0]}
        known = {"config": config_data(self.config), "about": about}
        return write_text(path, json.dumps(known, indent=1) + "\n")

    def plot(self, path: str | PathLike[str]) -> Path:
        """Draw error against retention of every setting that was tried."""
        drawing = figure(figsize=(6.4, 4.2))
        axis = drawing.subplots()
        floor = min((t.distance for t in self.trials if t.distance > 0), default=1e-9)
        for trial in self.trials:
            is_chosen = self._is_chosen(trial)
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
    cache: str | None = None,
    max_new_tokens: int = 64,
    tick: Callable[[str, int, int], None] = lambda what, done, total: None,
    **options: Any,
) -> Calibration:
    """Suggest a setting for this model from `inputs`, each what `model.generate` takes.

    `start` is a setting to compare with; its other fields (score, mass, ...) are kept. With
    `cache="fp8"`, by default that of `start`, the suggestion runs once more with a cache of 8 bits,
    and has it if the model bears it. `options` go to `generate`. `tick(what, done, total)` is
    called as the work proceeds.
    """
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    base = replace(start or PulseConfig(), schedule="paper", budget="dynamic")
    wanted = base.updated(cache=base.cache if cache is None else cache)
    if wanted.cache == "fp8":
        patch(model, wanted.updated(anchor=None)).unpatch()  # refused now, not after minutes
    base = base.updated(cache="model")
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
    float8, config = None, best.config
    if wanted.cache == "fp8":
        float8 = float8_trial(forced, config)
        config = config if float8.breaks(best) else config.updated(cache="fp8")
        tick("cache of 8 bits", 1, 1)
    return Calibration(config, trials, lost, follows, seen, remarks, schedules, float8)


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
