"""Presets, defaults, configs as values, and what a config refuses."""

import math

import pytest
import torch

import visionpulse as vp
from visionpulse.config import resolve
from visionpulse.testing import assert_clear_error
from visionpulse.testing.draw import Draws


def test_presets_are_the_published_settings():
    pruning = {name: c for name, c in vp.PRESETS.items() if c.schedule == "paper"}
    assert set(vp.PRESETS) - set(pruning) == {"dense"}
    assert {name: (c.tau, c.ratio) for name, c in pruning.items()} == {
        "10pct": (0.4, (0.05, 0.10)),
        "5pct": (0.1, (0.01, 0.05)),
    }
    assert vp.PRESETS["10pct"] == vp.PulseConfig()


def test_a_config_is_a_value():
    a = vp.PulseConfig(tau=1, ratio=[0, 1], anchor=[3, 9])
    assert a == vp.PulseConfig(tau=1.0, ratio=(0.0, 1.0), anchor=(3, 9)) and hash(a) == hash(a)
    assert a.updated(tau=0.5).tau == 0.5 and a.tau == 1.0
    assert vp.PulseConfig(anchor=[7]).anchor == 7
    assert resolve(a) is a and resolve("5pct") is vp.PRESETS["5pct"]


def test_functional_ops_ignore_what_belongs_to_a_model():
    draws = Draws(0)
    q, k = draws.normal(1, 4, 16), draws.normal(1, 2, 30, 16)
    kv, visual = vp.KVCache(k, k), vp.VisualTokens.from_spans([[(2, 28)]])
    plain = vp.decode(q, kv, visual, vp.PulseConfig())[0]
    other = vp.PulseConfig(anchor=99, schedule="lookback", refresh=1, dense="model")
    assert torch.equal(vp.decode(q, kv, visual, other)[0], plain)


# name: (call, kind of error, words of the message: what was expected or came, and the way out)
TABLE = {
    "tau zero": (lambda: vp.PulseConfig(tau=0), ValueError, ["tau", "> 0", "got 0"]),
    "tau negative": (lambda: vp.PulseConfig(tau=-1.0), ValueError, ["tau", "got -1.0", "presets"]),
    "tau nan": (lambda: vp.PulseConfig(tau=math.nan), ValueError, ["tau", "finite", "nan"]),
    "tau infinite": (lambda: vp.PulseConfig(tau=math.inf), ValueError, ["tau", "finite", "inf"]),
    "tau text": (lambda: vp.PulseConfig(tau="hot"), TypeError, ["tau", "number", "str"]),
    "ratio swapped": (
        lambda: vp.PulseConfig(ratio=(0.2, 0.1)),
        ValueError,
        ["r_min <= r_max", "(0.2, 0.1)", "smaller bound"],
    ),
    "ratio above one": (lambda: vp.PulseConfig(ratio=(0.2, 1.1)), ValueError, ["<= 1", "1.1"]),
    "ratio below zero": (lambda: vp.PulseConfig(ratio=(-0.1, 1)), ValueError, ["0 <=", "-0.1"]),
    "ratio nan": (lambda: vp.PulseConfig(ratio=(0.1, math.nan)), ValueError, ["ratio", "nan"]),
    "ratio single": (lambda: vp.PulseConfig(ratio=0.1), TypeError, ["pair", "0.1"]),
    "mass unknown": (lambda: vp.PulseConfig(mass="sum"), ValueError, ["'sum'", "'max', 'mean'"]),
    "score unknown": (lambda: vp.PulseConfig(score="p"), ValueError, ["'p'", "'prob_tau'"]),
    "score not a name": (lambda: vp.PulseConfig(score=1), TypeError, ["score", "int", "prob"]),
    "anchor output": (lambda: vp.PulseConfig(anchor_output="x"), ValueError, ["'x'", "'pruned'"]),
    "schedule": (lambda: vp.PulseConfig(schedule="x"), ValueError, ["'x'", "'lookback'"]),
    "dense": (lambda: vp.PulseConfig(dense="x"), ValueError, ["'x'", "'ours', 'model'"]),
    "backend of a config": (lambda: vp.PulseConfig(backend="x"), ValueError, ["'x'", "reference"]),
    "budget unknown": (lambda: vp.PulseConfig(budget="x"), ValueError, ["'x'", "'dynamic'"]),
    "budget no policy": (lambda: vp.PulseConfig(budget=7), TypeError, ["bound", "counts", "int"]),
    "top-p by logits": (
        lambda: vp.PulseConfig(budget=vp.TopP(0.5), score="logit"),
        ValueError,
        ["TopP", "prob", "'logit'"],
    ),
    "refresh negative": (lambda: vp.PulseConfig(refresh=-1), ValueError, ["refresh", "-1", "0"]),
    "refresh fraction": (lambda: vp.PulseConfig(refresh=1.5), ValueError, ["refresh", "1.5"]),
    "anchor negative": (lambda: vp.PulseConfig(anchor=-1), ValueError, ["anchor", ">= 0", "-1"]),
    "anchors unsorted": (lambda: vp.PulseConfig(anchor=(9, 3)), ValueError, ["ascending", "9"]),
    "anchor fraction": (lambda: vp.PulseConfig(anchor=0.5), TypeError, ["layer number", "0.5"]),
    "anchor per layer": (
        lambda: vp.PulseConfig(schedule="per_layer", anchor=3),
        ValueError,
        ["per_layer", "3", "anchor=None"],
    ),
    "dense per layer": (
        lambda: vp.PulseConfig(schedule="per_layer", anchor_output="dense"),
        ValueError,
        ["per_layer", "pruned"],
    ),
    "anchors looking back": (
        lambda: vp.PulseConfig(schedule="lookback", anchor=(3, 9)),
        ValueError,
        ["lookback", "(3, 9)", "paper"],
    ),
    "dense with an anchor": (
        lambda: vp.PulseConfig(schedule="dense", anchor=3),
        ValueError,
        ["no anchor", "3", "paper"],
    ),
    "dense by the model": (
        lambda: vp.PulseConfig(schedule="dense", dense="model"),
        ValueError,
        ["unpatched", "leave out dense"],
    ),
    "unknown field": (
        lambda: vp.PulseConfig().updated(temperature=1),
        ValueError,
        ["'temperature'", "tau"],
    ),
    "fixed ratio": (lambda: vp.Fixed(1.5), ValueError, ["Fixed", "0..1", "1.5"]),
    "top-k zero": (lambda: vp.TopK(0), ValueError, ["TopK", ">= 1", "0"]),
    "top-p zero": (lambda: vp.TopP(0.0), ValueError, ["TopP", "0 < p", "0.0"]),
    "budget name taken": (
        lambda: vp.register_budget("dynamic", vp.Fixed),
        ValueError,
        ["'dynamic'", "taken"],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_setting_gets_one_clear_error(name):
    assert_clear_error(*TABLE[name])
