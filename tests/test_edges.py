"""Inputs that no check refuses, by design; docs/limits.md says what they give."""

import pytest
import torch

import visionpulse as vp

N = 40


def problem(size=N):
    draws = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(*shape, generator=draws) for shape in ((1, 4, 16), (1, 2, N, 16), (1, 2, N, 16))
    )
    return q, vp.KVCache(k[:, :, :size], v[:, :, :size])


def selection(*indices):
    made = torch.tensor([indices], dtype=torch.int32)
    counts = torch.tensor([len(indices)], dtype=torch.int32)
    return vp.Selection(made, counts, torch.zeros(1), torch.zeros(1))


def test_a_nan_visual_key_shows_in_the_mass_and_keeps_the_most_tokens(backend):
    q, kv = problem()
    kv.k[0, 0, 35] = torch.nan
    visual = vp.VisualTokens.from_spans([[(4, 38)]])
    out, kept = vp.decode(q, kv, visual, "10pct", backend=backend)
    assert kept.mass.isnan().all() and kept.mass_mean.isnan().all()
    assert kept.indices.tolist() == [[4, 5, 6]]  # r_max of 34, by position: every score is NaN
    assert out.isfinite().all()  # the key itself was not kept
    assert torch.allclose(out, vp.attend(q, kv, visual, kept, backend=backend), atol=1e-5)
    assert vp.attend(q, kv, backend=backend)[:, :2].isnan().all()  # as dense attention has it


@pytest.mark.parametrize("value", (torch.nan, torch.inf), ids=("nan", "inf"))
def test_k_of_a_later_token_does_not_reach_an_earlier_query(backend, value):
    q, kv = problem()
    q = q[:, None].repeat(1, 3, 1, 1)
    wanted = vp.attend(q, kv, backend=backend)
    kv.k[:, :, -1] = value
    got = vp.attend(q, kv, backend=backend)
    assert torch.allclose(got[:, :2], wanted[:, :2], atol=1e-6)
    assert got[:, 2].isnan().all() or value == torch.inf


@pytest.mark.parametrize("value", (torch.nan, torch.inf), ids=("nan", "inf"))
def test_v_of_a_later_token_stays_apart_where_it_is_said_to(backend, value):
    """One query a call, or the reference."""
    q, kv = problem()
    several = q[:, None].repeat(1, 3, 1, 1)
    wanted = vp.attend(several, kv, backend=backend)
    kv.v[:, :, -1] = value
    got = vp.attend(several, kv, backend="reference")
    assert torch.allclose(got[:, :2], wanted[:, :2], atol=1e-5)
    assert not got[:, 2].isfinite().any()
    for length in (N - 2, N - 1):
        one = vp.KVCache(kv.k, kv.v, torch.tensor([length], dtype=torch.int32))
        alone = vp.attend(q, one, backend=backend)
        assert torch.allclose(alone, wanted[:, length - N + 2], atol=1e-5)


def test_a_selection_of_a_longer_cache_leaves_out_what_lies_behind_this_one(backend):
    q, longer = problem()
    everything = vp.PulseConfig(ratio=(1.0, 1.0))
    _, kept = vp.decode(q, longer, vp.VisualTokens.from_spans([[(4, 38)]]), everything,
                        backend=backend)  # fmt: skip
    _, kv = problem(size=24)
    visual = vp.VisualTokens.from_spans([[(4, 24)]])
    out = vp.attend(q, kv, visual, kept, backend=backend)
    assert torch.allclose(out, vp.attend(q, kv, backend=backend), atol=1e-5)
    by_hand = vp.Selection(kept.indices, kept.counts, kept.mass, kept.mass_mean)
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.23, got 4\.\.37"):
        vp.attend(q, kv, visual, by_hand, backend=backend)


def test_a_text_position_in_a_selection_counts_once(backend):
    q, kv = problem()
    visual = vp.VisualTokens.from_spans([[(4, 38)]])
    out = vp.attend(q, kv, visual, selection(1, 5), backend=backend)
    assert torch.allclose(out, vp.attend(q, kv, visual, selection(5), backend=backend), atol=1e-5)


def test_a_view_into_a_larger_buffer_passes_and_a_cut_one_does_not(backend):
    q, kv = problem()
    tail = vp.KVCache(kv.k[:, :, 20:], kv.v[:, :, 20:])
    wide = vp.KVCache(kv.k[:, :1].expand(3, 1, N, 16), kv.v[:, :1].expand(3, 1, N, 16))
    vp.attend(q, tail, backend=backend)
    vp.attend(q.expand(3, 4, 16), wide, backend=backend)
    kv.k.untyped_storage().resize_(4 * (2 * N * 16 - 1))
    with pytest.raises(ValueError, match="storage of k holds 5116 bytes"):
        vp.attend(q, tail, backend=backend)
