"""Pictures of a trace for print, by matplotlib: mass and K over steps, kept tokens per step."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import figure, save_figure
from .layout import KeptStep, RowLayout, text_of

_ACCENT, _BAR = "#d9480f", "#9db2ce"
_WIDEST = 3.0  # inches of a drawn picture


def plot(
    rows: Iterable[RowLayout],
    path: str | PathLike[str],
    *,
    tokenizer: Any = None,
    conversation: int = 0,
    row: int = 0,
    layer: int | None = None,
    steps: Sequence[int] | None = None,
) -> Path:
    """Draw one row of a trace to `path` (png, pdf, svg): mass, K, and the kept tokens of `steps`.

    Without `steps`, the steps with the most and the least kept tokens and some between are drawn,
    eight at most.
    """
    chosen = _chosen(rows, conversation, row)
    layer = min(chosen.steps) if layer is None else layer
    if layer not in chosen.steps:
        known = ", ".join(map(str, chosen.steps))
        raise ValueError(f"no anchor layer {layer} in this trace; known: {known}")
    kept_steps, text = chosen.steps[layer], text_of(tokenizer)
    shown_steps = _spread(kept_steps) if steps is None else list(steps)
    wrong = [step for step in shown_steps if not 0 <= step < len(kept_steps)]
    if wrong:
        raise ValueError(f"steps must be in 0..{len(kept_steps) - 1}, got {wrong}")
    width = max(9.0, min(24.0, 0.32 * len(kept_steps)))
    column = min(width / max(len(shown_steps), 1), _WIDEST)
    below = sum(column * grid.rows / grid.columns for grid in chosen.pictures) + 0.4
    drawing = figure(figsize=(width, 2.6 + below * bool(shown_steps)))
    upper, *lower = drawing.subfigures(
        1 + bool(shown_steps), 1, squeeze=False,
        height_ratios=[2.6, below][: 1 + bool(shown_steps)],
    )[:, 0]  # fmt: skip
    texts = [text(step.token) for step in kept_steps]
    _over_steps(upper.subplots(), kept_steps, chosen.n_visual, texts)
    if lower:
        axes = lower[0].subplots(len(chosen.pictures), len(shown_steps), squeeze=False)
        for column, step in enumerate(shown_steps):
            _kept(axes[:, column], chosen, kept_steps[step], text)
    return save_figure(drawing, path)


def _chosen(rows: Iterable[RowLayout], conversation: int, row: int) -> RowLayout:
    known = []
    for laid in rows:
        if (laid.conversation, laid.row) == (conversation, row):
            return laid
        known.append(f"({laid.conversation}, {laid.row})")
    raise ValueError(
        f"no conversation {conversation} row {row} in this trace; known: {', '.join(known)}"
    )


def _spread(steps: Sequence[KeptStep], most: int = 8) -> list[int]:
    """Steps whose counts are spread evenly from the fewest to the most, in order of time."""
    by_count = sorted(range(len(steps)), key=lambda i: len(steps[i].kept))
    places = np.linspace(0, len(by_count) - 1, min(most, len(by_count))).round().astype(int)
    return sorted(by_count[i] for i in places)


def _over_steps(axis: Any, steps: Sequence[KeptStep], n_visual: int, texts: Sequence[str]) -> None:
    at = np.arange(len(steps))
    counts = axis.twinx()
    counts.bar(at, [len(step.kept) for step in steps], color=_BAR, width=0.75)
    counts.set_ylabel(f"tokens kept, of {n_visual}")
    axis.plot(at, [step.mass for step in steps], color=_ACCENT, marker=".", label="largest head")
    axis.plot(at, [step.mass_mean for step in steps], color=_ACCENT, alpha=0.4, label="mean")
    axis.set_zorder(counts.get_zorder() + 1)  # the line before the bars
    axis.patch.set_visible(False)
    axis.set_ylim(0, 1.02)
    axis.set_xlim(-0.6, len(steps) - 0.4)
    axis.set_ylabel("mass on visual tokens", color=_ACCENT)
    # above the bars, which may reach the top at any step
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=7, frameon=False)
    every = -(-len(steps) // 80)  # labels that can be read
    axis.set_xticks(at[::every], [_plain(t) for t in texts[::every]], rotation=90, fontsize=7)
    axis.set_xlabel("token read")


def _kept(axes: Any, row: RowLayout, step: KeptStep, text: Any) -> None:
    flags = np.zeros(sum(grid.tokens for grid in row.pictures), bool)
    flags[step.kept] = True
    first = 0
    for axis, grid in zip(axes, row.pictures, strict=True):
        kept = flags[first : first + grid.tokens].reshape(grid.rows, grid.columns)
        first += grid.tokens
        box = (-0.5, grid.columns - 0.5, grid.rows - 0.5, -0.5)
        if grid.pixels is not None:
            axis.imshow(grid.pixels, extent=box, interpolation="nearest")
        veil = np.zeros((*kept.shape, 4))
        veil[..., 3] = np.where(kept, 0.0, 0.72)
        axis.imshow(veil, extent=box, interpolation="nearest")
        rows, columns = kept.nonzero()
        axis.scatter(columns, rows, s=9, facecolors="none", edgecolors=_ACCENT, linewidths=0.7)
        axis.set_axis_off()
    title = f"step {step.step}: {_plain(text(step.token))}\nK {len(step.kept)}"
    axes[0].set_title(title, fontsize=7)


def _plain(text: str) -> str:
    """A token as an axis can show it: one line, no dollar that would start mathematics."""
    return text.replace("\n", "\\n").replace("$", r"\$")
