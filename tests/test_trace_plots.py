"""The printed form of a trace: what is drawn is what was kept."""

import builtins

import numpy as np
import pytest

from visionpulse.models import Trace
from visionpulse.trace import plots
from visionpulse.trace.layout import KeptStep, PictureGrid

SPANS = [(2, 18)]


def trace_of(kept, tokens):
    n = len(kept)
    mass = np.linspace(0.1, 0.9, n)
    return Trace(
        conversation=np.zeros(n, np.int64), step=np.arange(n), layer=np.full(n, 2),
        row=np.zeros(n, np.int64), token=np.array(tokens), n_visual=np.full(n, 16),
        mass=mass, mass_mean=mass / 2, ends=np.cumsum([len(k) for k in kept]),
        positions=np.array([p for k in kept for p in k]), spans={(0, 0): SPANS}, about={},
    )  # fmt: skip


KEPT = [[2], [3, 4, 5], [17], [2, 3], [10, 11, 12, 13]]


def test_what_is_drawn_is_what_was_kept(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, made = [], plots._kept
    monkeypatch.setattr(plots, "_kept", lambda *args: (made(*args), drawn.append(args[0])))
    pixels = np.full((32, 32, 3), 200, np.uint8)
    trace = trace_of(KEPT, range(5))
    out = trace.plot(tmp_path / "a.png", pictures=[PictureGrid(4, 4, pixels)], steps=[1, 2, 4])
    assert out.stat().st_size > 10_000
    for axes, step in zip(drawn, (1, 2, 4), strict=True):
        points = axes[0].collections[0].get_offsets()  # (column, row) of each kept token
        places = sorted(int(row) * 4 + int(column) for column, row in points)
        assert places == [p - 2 for p in KEPT[step]]
        veil = axes[0].images[1].get_array()[..., 3]
        assert sorted(np.flatnonzero(veil == 0).tolist()) == places


def test_lines_and_bars_are_the_trace(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    axes, made = [], plots._over_steps
    monkeypatch.setattr(plots, "_over_steps", lambda *args: (made(*args), axes.append(args[0])))
    trace = trace_of(KEPT, range(5))
    trace.plot(tmp_path / "a.svg", tokenizer=lambda t: f"${t}\n")
    (axis,) = axes
    assert np.array_equal(axis.lines[0].get_ydata(), trace.mass)
    (bars,) = (a for a in axis.figure.axes if a is not axis and a.patches)
    assert [bar.get_height() for bar in bars.patches] == [1, 3, 1, 2, 4]
    assert [label.get_text() for label in axis.get_xticklabels()][:2] == [r"\$0\n", r"\$1\n"]


def test_steps_are_spread_over_the_counts():

    counts = [1, 5, 1, 9, 3, 7, 2, 1, 1, 8, 6, 4]
    steps = [KeptStep(i, 0, 0.0, 0.0, np.arange(n)) for i, n in enumerate(counts)]
    drawn = plots._spread(steps)
    assert len(drawn) == 8 and drawn == sorted(drawn)
    assert {1, 9} <= {counts[i] for i in drawn}


def test_what_is_not_in_the_trace_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    trace = trace_of(KEPT, range(5))
    for options, message in (
        ({"row": 3}, r"no conversation 0 row 3 .* known: \(0, 0\)"),
        ({"layer": 9}, "no anchor layer 9 in this trace; known: 2"),
        ({"steps": [7]}, r"steps must be in 0\.\.4"),
    ):
        with pytest.raises(ValueError, match=message):
            trace.plot(tmp_path / "a.png", **options)


def test_without_matplotlib_the_way_out_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"visionpulse\[plots\].*to_html"):
        trace_of(KEPT, range(5)).plot(tmp_path / "a.png")
