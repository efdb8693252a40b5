"""Pictures of a trace for print, by matplotlib: mass and K over steps, kept tokens per step."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .layout import Frame, Shown, Told, sequences, text_of
from .record import Trace

_ACCENT, _BAR = "#d9480f", "#9db2ce"
_WIDEST = 3.0  # inches of a drawn picture


def pyplot() -> Any:
    """Give matplotlib's Figure without a window, or say how to get it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'visionpulse[plots]'; "
            "trace.to_html(path) needs nothing"
        ) from error

    def figure(*args: Any, **kwargs: Any) -> Any:
        made = Figure(*args, layout="constrained", **kwargs)
        FigureCanvasAgg(made)
        return made

    return figure


def plot(
    trace: Trace,
    path: str | PathLike[str],
    *,
    pictures: "Sequence[Shown] | dict[tuple[int, int], Sequence[Shown]] | None" = None,
    tokenizer: Any = None,
    conversation: int = 0,
    row: int = 0,
    layer: int | None = None,
    steps: Sequence[int] | None = None,
) -> Path:
    """Draw one row of a trace to `path` (png, pdf, svg): mass, K, and the kept tokens of `steps`.

    Without `steps`, the steps with the most and the least kept tokens and those between are drawn,
    eight at most.
    """
    told = _chosen(trace, pictures, conversation, row)
    layer = min(told.frames) if layer is None else layer
    if layer not in told.frames:
        known = ", ".join(map(str, told.frames))
        raise ValueError(f"no anchor layer {layer} in this trace; known: {known}")
    frames, text = told.frames[layer], text_of(tokenizer)
    shown_steps = _steps(frames) if steps is None else list(steps)
    wrong = [step for step in shown_steps if not 0 <= step < len(frames)]
    if wrong:
        raise ValueError(f"steps must be in 0..{len(frames) - 1}, got {wrong}")
    width = max(9.0, min(24.0, 0.32 * len(frames)))
    column = min(width / max(len(shown_steps), 1), _WIDEST)
    below = sum(column * shown.rows / shown.columns for shown in told.shown) + 0.4
    figure = pyplot()(figsize=(width, 2.6 + below * bool(shown_steps)))
    upper, *lower = figure.subfigures(
        1 + bool(shown_steps), 1, squeeze=False,
        height_ratios=[2.6, below][: 1 + bool(shown_steps)],
    )[:, 0]  # fmt: skip
    _over_steps(upper.subplots(), frames, told.n_visual, [text(f.token) for f in frames])
    if lower:
        axes = lower[0].subplots(len(told.shown), len(shown_steps), squeeze=False)
        for column, step in enumerate(shown_steps):
            _kept(axes[:, column], told, frames[step], text)
    figure.savefig(path, dpi=150)
    return Path(path)


def _chosen(trace: Trace, pictures: Any, conversation: int, row: int) -> Told:
    known = []
    for told in sequences(trace, pictures):
        if (told.conversation, told.row) == (conversation, row):
            return told
        known.append(f"({told.conversation}, {told.row})")
    raise ValueError(
        f"no conversation {conversation} row {row} in this trace; known: {', '.join(known)}"
    )


def _steps(frames: Sequence[Frame], most: int = 8) -> list[int]:
    """Steps whose counts are spread evenly from the fewest to the most, in order of time."""
    by_count = sorted(range(len(frames)), key=lambda i: len(frames[i].kept))
    places = np.linspace(0, len(by_count) - 1, min(most, len(by_count))).round().astype(int)
    return sorted(by_count[i] for i in places)


def _over_steps(axis: Any, frames: Sequence[Frame], n_visual: int, texts: Sequence[str]) -> None:
    at = np.arange(len(frames))
    counts = axis.twinx()
    counts.bar(at, [len(frame.kept) for frame in frames], color=_BAR, width=0.75)
    counts.set_ylabel(f"tokens kept, of {n_visual}")
    axis.plot(at, [frame.mass for frame in frames], color=_ACCENT, marker=".", label="largest head")
    axis.plot(at, [frame.mass_mean for frame in frames], color=_ACCENT, alpha=0.4, label="mean")
    axis.set_zorder(counts.get_zorder() + 1)  # the line before the bars
    axis.patch.set_visible(False)
    axis.set_ylim(0, 1.02)
    axis.set_xlim(-0.6, len(frames) - 0.4)
    axis.set_ylabel("mass on visual tokens", color=_ACCENT)
    # above the bars, which may reach the top at any step
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=7, frameon=False)
    every = -(-len(frames) // 80)  # labels that can be read
    axis.set_xticks(at[::every], [_plain(t) for t in texts[::every]], rotation=90, fontsize=7)
    axis.set_xlabel("token read")


def _kept(axes: Any, told: Told, frame: Frame, text: Any) -> None:
    flags = np.zeros(sum(shown.tokens for shown in told.shown), bool)
    flags[frame.kept] = True
    first = 0
    for axis, shown in zip(axes, told.shown, strict=True):
        kept = flags[first : first + shown.tokens].reshape(shown.rows, shown.columns)
        first += shown.tokens
        box = (-0.5, shown.columns - 0.5, shown.rows - 0.5, -0.5)
        if shown.pixels is not None:
            axis.imshow(shown.pixels, extent=box, interpolation="nearest")
        veil = np.zeros((*kept.shape, 4))
        veil[..., 3] = np.where(kept, 0.0, 0.72)
        axis.imshow(veil, extent=box, interpolation="nearest")
        rows, columns = kept.nonzero()
        axis.scatter(columns, rows, s=9, facecolors="none", edgecolors=_ACCENT, linewidths=0.7)
        axis.set_axis_off()
    title = f"step {frame.step}: {_plain(text(frame.token))}\nK {len(frame.kept)}"
    axes[0].set_title(title, fontsize=7)


def _plain(text: str) -> str:
    """A token as an axis can show it: one line, no dollar that would start mathematics."""
    return text.replace("\n", "\\n").replace("$", r"\$")
