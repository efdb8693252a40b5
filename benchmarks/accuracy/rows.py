"""The rows of the table: what is put on the tiny model while it answers."""

from compared import methods
from measure import Row

import visionpulse as vp

ANCHOR = 2  # the default of a model of six layers
P5, P10 = vp.PRESETS["5pct"], vp.PRESETS["10pct"]


def _fixed(ratio: float) -> vp.PulseConfig:
    return vp.PulseConfig(budget=vp.Fixed(ratio))


def _method(make, *args, **kwargs):
    """A baseline made in the process that runs it."""
    return lambda: make(*args, **kwargs)


FULL = Row("full attention", "", None)
FIRST = Row("dynamic 5pct", "VisionPulse", P5)

RANDOM = methods.RandomTokens
ROWS = (
    Row("blind: no visual token in decode", "control", _method(methods.Blind)),
    Row("none after the anchor", "control", _method(methods.NoneAfter, ANCHOR)),
    Row("random tokens 5 %", "control", _method(RANDOM, 0.05, ANCHOR)),
    Row("random tokens 10 %", "control", _method(RANDOM, 0.10, ANCHOR)),
    Row("dynamic 10pct", "VisionPulse", P10),
    Row("5pct, mass of the mean head", "VisionPulse", P5.updated(mass="mean")),
    Row("5pct, score logit", "VisionPulse", P5.updated(score="logit")),
    Row("5pct, score prob_tau", "VisionPulse", P5.updated(score="prob_tau")),
    Row("10pct, score logit", "VisionPulse", P10.updated(score="logit")),
    Row("10pct, score prob_tau", "VisionPulse", P10.updated(score="prob_tau")),
    Row("5pct, dense anchor", "VisionPulse", P5.updated(anchor_output="dense")),
    Row("5pct, lookback", "schedule (ours)", P5.updated(schedule="lookback")),
    Row("5pct, per layer", "schedule (ours)", P5.updated(schedule="per_layer")),
    Row("5pct, anchors 2 and 4", "schedule (ours)", P5.updated(anchor=(2, 4))),
    *(
        Row(f"5pct, anchor {layer}", "anchor", P5.updated(anchor=layer))
        for layer in (0, 1, 3, 4)
    ),
    *(Row(f"fixed {100 * r:g} %", "budget", _fixed(r)) for r in (0.01, 0.02, 0.05, 0.10)),
    # what 5pct keeps on average, rounded up: see the retention of its row
    Row("fixed 9 tokens", "budget", vp.PulseConfig(budget=vp.TopK(9))),
    Row("random budget 1..5 %", "budget", P5.updated(budget=vp.Random(seed=1))),
    Row("top_k 8", "budget", vp.PulseConfig(budget=vp.TopK(8))),
    Row("top_k 20", "budget", vp.PulseConfig(budget=vp.TopK(20))),
    Row("top_p 0.5", "budget", vp.PulseConfig(budget=vp.TopP(0.5))),
    Row("top_p 0.9", "budget", vp.PulseConfig(budget=vp.TopP(0.9))),
    Row("blocks of 64, 10pct", "released code", _method(methods.Blocks64, P10, ANCHOR)),
    *(Row(f"FastV {r} %", "static", _method(methods.FastV, r / 100)) for r in (5, 10, 50)),
    Row("FastV 10 %, at the anchor", "static", _method(methods.FastV, 0.10, k=ANCHOR + 1)),
    *(
        Row(f"VisionZip {r} %", "static", _method(methods.VisionZip, r / 100))
        for r in (5, 10, 50)
    ),
    *(Row(f"LOOK-M {r} %", "static", _method(methods.LookM, r / 100)) for r in (5, 10, 50)),
    Row("LOOK-M 10 %, no merging", "static", _method(methods.LookM, 0.10, merging=False)),
    *(
        Row(f"FastV {r} %, each step", "fixed, step by step",
            _method(methods.FastV, r / 100, every_step=True))
        for r in (5, 10)
    ),
    Row("FastV 50 %, then 5pct", "both", _method(
        methods.FastV, 0.50, then=P5.updated(anchor=ANCHOR))),
)  # fmt: skip

# The same on pictures with few decoys, and on larger ones than any in training.
SPARSE = (
    "full attention", "dynamic 5pct", "dynamic 10pct", "fixed 2 %", "random tokens 10 %",
    "blind: no visual token in decode", "FastV 10 %", "VisionZip 10 %", "LOOK-M 10 %",
)  # fmt: skip
LARGE = (
    "full attention", "dynamic 5pct", "dynamic 10pct", "fixed 1 %", "fixed 2 %", "FastV 10 %",
)  # fmt: skip
