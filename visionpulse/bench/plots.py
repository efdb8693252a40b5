"""Plots of measured rows: the roofline, time by context, time by retention.

Each takes rows and a path whose ending says the format (.png, .svg, .pdf). matplotlib is optional.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..figures import figure, save_figure
from .cost import Roof

# Colours that differ in lightness too, for print and for the colour-blind.
_COLOURS = ("#0b3c5d", "#d1495b", "#edae49", "#2e8b57", "#7a5195", "#8c8c8c", "#00a6a6", "#8b5a2b")
_MARKERS = "osD^vPX*"


class Point(NamedTuple):
    """One op of a roofline."""

    form: str
    context: str
    flops: float  # operations
    bytes: float  # the least that must move
    seconds: float


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    drawing = figure(figsize=(9.5, 5.2))
    axes = drawing.add_subplot()
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    return drawing, axes


def _save(drawing: Any, axes: Any, path: str | Path, note: str) -> None:
    axes.figure.legend(loc="outside right center", frameon=False, fontsize=9)
    if note:
        drawing.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_figure(drawing, path)


def roofline(
    points: Sequence[Point], roof: Roof, path: str | Path, *, title: str, note: str = ""
) -> None:
    """Operations per second against operations per byte, under the two measured roofs.

    The ops of decoding stand at the same few operations per byte, so forms differ in height; the
    size of a mark grows with the context.
    """
    drawing, axes = _axes(title, "operations per byte that must move", "GFLOP/s")
    at = [point.flops / point.bytes for point in points]
    end = 2 * max(*at, roof.compute / (roof.gather or roof.read))
    begin = min(at) / 2.5
    _roof(axes, roof.read, roof.compute, begin, end, "-", "read")
    if roof.gather:
        _roof(axes, roof.gather, roof.compute, begin, end, ":", "gather")
    contexts = list(dict.fromkeys(point.context for point in points))
    forms = list(dict.fromkeys(point.form for point in points))
    for number, form in enumerate(forms):
        own = [point for point in points if point.form == form]
        aside = 2 ** (0.16 * (number - (len(forms) - 1) / 2))
        axes.scatter(
            [aside * point.flops / point.bytes for point in own],
            [point.flops / point.seconds / 1e9 for point in own],
            s=[30 + 30 * contexts.index(point.context) for point in own],
            color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)],
            edgecolors="white", linewidths=0.7, label=form, zorder=3,
        )  # fmt: skip
    axes.set_xlim(begin, end)
    _plain_ticks(axes)
    axes.xaxis.set_major_formatter(axes.yaxis.get_major_formatter())
    about = "Forms of about equal intensity stand side by side"
    if len(contexts) > 1:
        about += f"; marks grow with the context, {contexts[0]} to {contexts[-1]}"
    _save(drawing, axes, path, f"{note}. {about}." if note else f"{about}.")


def _roof(
    axes: Any, rate: float, compute: float, begin: float, end: float, style: str, name: str
) -> None:
    ridge = compute / rate
    xs = [begin, ridge, end] if begin < ridge < end else [begin, end]
    axes.plot(
        xs, [min(rate * x, compute) / 1e9 for x in xs], color="#222222", linestyle=style,
        linewidth=1.6, label=f"{name} {rate / 1e9:.0f} GB/s, product {compute / 1e9:,.0f} GFLOP/s",
    )  # fmt: skip


def _lines(
    axes: Any,
    series: Mapping[str, Sequence[tuple[float, float]]],
    labels: Mapping[float, str],
) -> None:
    for number, (name, line) in enumerate(series.items()):
        xs, ys = zip(*sorted(line), strict=True)
        axes.plot(
            xs, ys, color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)],
            markersize=6, linewidth=1.8, label=name,
        )  # fmt: skip
    axes.set_xticks(list(labels), list(labels.values()))
    axes.minorticks_off()
    _plain_ticks(axes)


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def by_context(
    series: Mapping[str, Mapping[int, float]],
    path: str | Path,
    *,
    title: str,
    weights: float | None = None,
    note: str = "",
    unit: str = "milliseconds per step",
) -> None:
    """Milliseconds (from seconds) against visual tokens; `weights` is drawn as a level line."""
    drawing, axes = _axes(title, "visual tokens in the context", unit)
    lines = {
        name: [(float(n), 1e3 * seconds) for n, seconds in line.items()]
        for name, line in series.items()
        if line
    }
    contexts = sorted({n for line in series.values() for n in line})
    _lines(axes, lines, {float(n): short(n) for n in contexts})
    if weights:
        axes.axhline(
            1e3 * weights, color="#222222", linestyle="--", linewidth=1, label="weights (predicted)"
        )
    _save(drawing, axes, path, note)


def by_retention(
    series: Mapping[str, Mapping[float, float]],
    path: str | Path,
    *,
    title: str,
    note: str = "",
) -> None:
    """A follower's time, as a share of dense attention's, against the share of tokens kept."""
    drawing, axes = _axes(title, "visual tokens kept, per cent", "time over our dense attention")
    lines = {
        name: [(100 * share, ratio) for share, ratio in line.items()]
        for name, line in series.items()
    }
    shares = sorted({share for line in series.values() for share in line})
    _lines(axes, lines, {100 * share: f"{100 * share:g}" for share in shares})
    axes.axhline(1.0, color="#222222", linestyle="--", linewidth=1, label="dense: no gain above")
    _save(drawing, axes, path, note)


def short(tokens: int) -> str:
    """4096 as 4k, as shapes are named."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
