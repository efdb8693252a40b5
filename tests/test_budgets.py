"""Budgets on the host and on the device. How backends run them is in test_backends.py."""

import numpy as np
import pytest
import torch

import visionpulse as vp
from visionpulse import budgets
from visionpulse.testing.draw import Draws


@pytest.mark.parametrize("ratio", (0.0, 0.01, 0.05, 0.1, 0.3, 0.999, 1.0))
def test_the_host_bound_is_the_largest_device_count(ratio):
    """The same float32 expression: a product in float64 would differ at some of these sizes."""
    n = torch.arange(0, 5000, dtype=torch.int32)
    count = budgets.clamp_count(torch.ones(len(n)), n, 0.0, ratio)
    bound = torch.tensor([budgets.bound_count(ratio, int(x)) for x in n])
    assert torch.equal(bound[1:], count[1:].long()) and bound[0] == 1


def test_the_product_is_in_float32():
    """In float64 some of these counts would be another: the test above could not see it."""
    n = np.arange(1, 5000)
    wide, narrow = np.floor(0.7 * n), np.floor(np.float32(0.7) * n.astype(np.float32))
    at = np.flatnonzero(wide != narrow)
    assert len(at) and all(budgets.bound_count(0.7, int(n[i])) == narrow[i] for i in at)


def test_a_nan_mass_opens_the_budget():
    n = torch.tensor([100, 0], dtype=torch.int32)
    count = budgets.clamp_count(torch.tensor([torch.nan, torch.nan]), n, 0.1, 0.3)
    assert count.tolist() == [30, 0]


def test_random_draws_repeat_and_go_on():
    def draws(policy):
        return [policy.within(0.1, 0.4).draw(4, torch.device("cpu")) for _ in range(3)]

    first, again = draws(vp.Random(seed=1)), draws(vp.Random(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], draws(vp.Random(seed=2))[0])
    assert all(((r >= 0.1) & (r <= 0.4)).all() for r in first)


class EveryThird:
    """A user's policy that needs the scores: a third of those above the mean."""

    def bound(self, n_visual):
        return max(1, n_visual // 3)

    def counts(self, mass, n_visual, scores):
        s = scores.masked_fill(scores == -torch.inf, 0.0)
        above = (s > s.sum(1, keepdim=True) / n_visual[:, None]).sum(1)
        return (above // 3).clamp(min=1).to(torch.int32)


def test_a_user_registers_a_policy(backend):
    budgets.REGISTRY.pop("every-third", None)
    vp.register_budget("every-third", EveryThird)
    draws = Draws(0)
    q, k = draws.normal(2, 4, 16), draws.normal(2, 2, 60, 16)
    kv, visual = vp.KVCache(k, k.clone()), vp.VisualTokens.from_spans([[(2, 50)], [(0, 9)]])
    config = vp.PulseConfig(budget="every-third")
    scores = torch.empty(2, 60)
    _, selection = vp.decode(q, kv, visual, config, scores=scores, backend=backend)
    wanted = EveryThird().counts(selection.mass, visual.counts, scores)
    assert torch.equal(selection.counts, wanted) and selection.indices.shape == (2, 16)
    again = vp.select(scores, selection.mass, visual, config, backend=backend)
    assert torch.equal(again.indices, selection.indices)
    budgets.REGISTRY.pop("every-third")
