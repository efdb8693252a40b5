"""Does the mass say how many tokens a step uses? Pearson's r, scatter plots, similar layers."""

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..figures import figure, save_figure
from .observe import Observation

_ABREAST = 4  # panels of a row
_FEWEST = 8  # entries of a step for which a correlation says anything


class Correlation(NamedTuple):
    """Mass (mean of heads, tau 1) against activated tokens, in one layer at one threshold."""

    layer: int
    threshold: float
    pooled: float  # r over all entries
    per_step: float  # median over steps of r among the entries of that step; NaN if too few
    active: float  # mean share of visual tokens that are active in a step
    never: float  # mean share of visual tokens that are active in no step of an answer


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r; NaN where one side does not vary."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def correlations(seen: Observation) -> list[Correlation]:
    """The correlation of every observed layer at every threshold."""
    rows = []
    for i, layer in enumerate(seen.layers):
        mass = seen.mass_mean[:, i]
        for j, threshold in enumerate(seen.thresholds):
            active = seen.active[:, i, j]
            steps = [
                pearson(mass[here], active[here])
                for step in np.unique(seen.step)
                if (here := seen.step == step).sum() >= _FEWEST
            ]
            known = [r for r in steps if r == r]
            rows.append(
                Correlation(
                    layer,
                    threshold,
                    pearson(mass, active),
                    float(np.median(known)) if known else float("nan"),
                    float((active / np.maximum(seen.n_visual, 1)).mean()),
                    float(seen.never[:, i, j].mean()),
                )
            )
    return rows


def plot_correlation(seen: Observation, layer: int, path: str | PathLike[str]) -> Path:
    """Scatter mass against activated tokens of one layer, one panel per threshold."""
    i = seen.index_of(layer)
    count = len(seen.thresholds)
    columns = min(count, _ABREAST)
    lines = -(-count // columns)
    drawing = figure(figsize=(3.0 * columns, 2.8 * lines + 0.4))
    axes = drawing.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.set_axis_off()
    for j, (axis, threshold) in enumerate(zip(axes, seen.thresholds, strict=False)):
        active = seen.active[:, i, j]
        axis.scatter(seen.mass_mean[:, i], active, s=5, alpha=0.4, color="#3b5b8c", linewidths=0)
        r = pearson(seen.mass_mean[:, i], active)
        axis.set_title(f"threshold {threshold:g}, r = {r:.2f}", fontsize=9)
        axis.set_xlabel("visual mass")
        if j % columns == 0:
            axis.set_ylabel("activated tokens")
    drawing.suptitle(f"layer {layer}, {len(seen)} steps", fontsize=10)
    return save_figure(drawing, path)


def similarity(seen: Observation) -> Any:
    """Mean cosine of the visual attention of two layers, [L, L]."""
    return seen.similarity.mean(0)


def plot_similarity(seen: Observation, path: str | PathLike[str]) -> Path:
    """Draw the similarity of layers as a matrix."""
    drawing = figure(figsize=(5.2, 4.4))
    axis = drawing.subplots()
    drawn = axis.imshow(similarity(seen), vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(seen.layers)), seen.layers, fontsize=7)
    axis.set_yticks(range(len(seen.layers)), seen.layers, fontsize=7)
    axis.set_xlabel("layer")
    axis.set_ylabel("layer")
    drawing.colorbar(drawn, label="cosine of visual attention")
    return save_figure(drawing, path)
