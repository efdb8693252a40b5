"""Presets, defaults, and configs as values. The errors are in test_errors.py."""

import torch

import visionpulse as vp
from visionpulse.config import resolve


def test_presets_are_the_published_settings():
    assert {name: (c.tau, c.ratio) for name, c in vp.PRESETS.items()} == {
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
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 16, generator=generator)
    k = torch.randn(1, 2, 30, 16, generator=generator)
    kv, visual = vp.KVCache(k, k), vp.VisualTokens.from_spans([[(2, 28)]])
    plain = vp.decode(q, kv, visual, vp.PulseConfig())[0]
    other = vp.PulseConfig(anchor=99, schedule="lookback", refresh=1, dense="model")
    assert torch.equal(vp.decode(q, kv, visual, other)[0], plain)
