"""The arithmetic of the baselines, each piece against its definition."""

import torch
from methods.evict import best
from methods.fastv import last_query_attention
from methods.lookm import merge, received
from methods.visionzip import zip_tokens

from visionpulse.testing.draw import Draws


def test_best_keeps_the_lowest_of_equals():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    candidates = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    kept = best(scores, candidates, torch.tensor([2, 3]))
    assert kept.tolist() == [[False, True, True, False, False], [False, True, True, True, False]]


def test_last_query_attention_is_the_softmax():
    draws = Draws(0)
    q, k = draws.normal(2, 6, 9, 8), draws.normal(2, 2, 9, 8)
    seen = torch.ones(2, 9).bool()
    seen[1, :3] = False
    got = last_query_attention(q, k, seen, 0.3)
    for b in range(2):
        rows = [0.3 * q[b, h, -1] @ k[b, h // 3].T for h in range(6)]
        z = torch.stack(rows).masked_fill(~seen[b], -torch.inf)
        torch.testing.assert_close(got[b], z.softmax(-1).mean(0))


def test_received_sums_the_attention_matrix_in_slices():
    size = 300  # more than one slice
    draws = Draws(0)
    q, k = draws.normal(1, 4, size, 8), draws.normal(1, 2, size, 8)
    causal = torch.ones(1, 1, size, size).tril().bool()
    got = received(q, k, causal, 0.5)
    for g in range(2):
        z = 0.5 * q[0, 2 * g : 2 * g + 2] @ k[0, g].T
        share = z.masked_fill(~causal[0], -torch.inf).softmax(-1)
        torch.testing.assert_close(got[0, g], share.sum((0, 1)))


def test_lookm_merges_pivots():
    states = torch.tensor([[1.0], [3.0], [10.0], [20.0], [6.0]])
    keep = torch.tensor([True, False, True, False, False])
    nearest = torch.tensor([0, 2, 0])  # of slots 1, 3 and 4
    # slot 0: mean of 1, (3 + 1) / 2 and (6 + 1) / 2; slot 2: mean of 10 and (20 + 10) / 2
    merged = merge(states, keep, nearest)
    torch.testing.assert_close(merged[keep][:, 0], torch.tensor([(1 + 2 + 3.5) / 3, 12.5]))


def test_visionzip_merges_by_key_into_even_targets():
    features = torch.arange(12.0).reshape(6, 2)
    angle = torch.tensor([0.0, 0.1, 1.5, 1.4, 0.2, 3.0])
    keys = torch.stack([angle.cos(), angle.sin()], 1)
    dominant = torch.tensor([False, False, False, False, False, True])
    merged, kept = zip_tokens(features, keys, dominant, 2)
    # the rest are 0..4, targets lie two apart: 0 and 2; 1 and 4 go to 0, 3 goes to 2
    assert kept.tolist() == [True, False, True, False, False, True]
    torch.testing.assert_close(merged[0], features[0] + (features[1] + features[4]) / 2)
    torch.testing.assert_close(merged[2], features[2] + features[3])
    assert torch.equal(merged[5], features[5])
