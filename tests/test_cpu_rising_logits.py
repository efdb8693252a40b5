"""The CPU's running softmax over logits that rise, fall, or are not finite, block after block."""

import math

import pytest
import torch

import visionpulse as vp
from visionpulse.backends import get

REASON = get("cpu").unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")
BLOCK, BLOCKS, HEADS, KV_HEADS, DIM = 32, 12, 8, 2, 64
INF, NAN = math.inf, math.nan
# the largest logit of each block, in powers of two
CLIMBS = {
    "rises a little": [3.0 * i for i in range(BLOCKS)],
    "rises by just less than the slack": [7.75 * i for i in range(BLOCKS)],
    "rises by just more": [8.25 * i for i in range(BLOCKS)],
    "rises far": [40.0 * i for i in range(BLOCKS)],
    "falls": [-20.0 * i for i in range(BLOCKS)],
    "rises once, late": [0.0] * (BLOCKS - 1) + [30.0],
    "creeps up, then leaps": [0.0, 4.0, 7.0, 7.5, 7.5, 60.0] + [59.0] * (BLOCKS - 6),
    "no finite logit at first": [-INF] * 3 + [5.0] * (BLOCKS - 3),
    "none in the middle": [5.0] * 4 + [-INF] * 3 + [9.0] * (BLOCKS - 7),
}


def problem(largest, dtype, heads=HEADS):
    """Column 0 of K is the logit; its first key of a block has the largest, half the heads see
    them halved."""
    draws = torch.Generator().manual_seed(7)
    logits = torch.tensor(largest).repeat_interleave(BLOCK) / math.log2(math.e)
    logits[torch.arange(logits.numel()) % BLOCK != 5] -= 2.0
    k = torch.zeros(1, KV_HEADS, logits.numel(), DIM)
    k[..., 0] = logits
    v = torch.randn(k.shape, generator=draws)
    q = torch.zeros(1, heads, DIM)
    q[:, ::2, 0], q[:, 1::2, 0] = 1.0, 0.5
    return q.to(dtype), vp.KVCache(k.to(dtype), v.to(dtype))


def expected(q, kv, tau=1.0):
    k = kv.k.double().repeat_interleave(q.shape[1] // KV_HEADS, 1)
    v = kv.v.double().repeat_interleave(q.shape[1] // KV_HEADS, 1)
    z = q[..., :1].double() * k[..., 0]
    weights = (z / tau).softmax(-1)
    return torch.einsum("bhn,bhnd->bhd", weights, v), weights


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("climb", CLIMBS)
def test_the_output_follows_the_logits(climb, dtype):
    q, kv = problem(CLIMBS[climb], dtype)
    out = vp.attend(q, kv, scale=1.0, backend="cpu")
    bound = 4e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected(q, kv)[0], rtol=bound, atol=bound)


@pytest.mark.parametrize("tau", (2.0, 0.4, 0.1, 0.05))
@pytest.mark.parametrize("climb", CLIMBS)
def test_scores_and_mass_follow_them(climb, tau):
    q, kv = problem(CLIMBS[climb], torch.float32)
    size = BLOCK * BLOCKS
    visual = vp.VisualTokens.from_spans([[(40, 200), (230, size - 10)]])
    config = vp.PulseConfig(ratio=(0.1, 0.4), tau=tau)
    scores, mass, mean = vp.score(q, kv, visual, config, scale=1.0, backend="cpu")
    shown = torch.zeros(size, dtype=torch.bool)
    shown[40:200] = shown[230 : size - 10] = True
    weights = expected(q, kv)[1].mean(1)
    torch.testing.assert_close(scores[0, shown].double(), weights[0, shown], rtol=1e-4, atol=1e-8)
    of_heads = expected(q, kv, tau)[1][..., shown].sum(-1)
    bound = 1e-4 + 16 * 2**-23 * 40 * BLOCKS / tau
    torch.testing.assert_close(mass.double(), of_heads.amax(-1), rtol=bound, atol=1e-8)
    torch.testing.assert_close(mean.double(), of_heads.mean(-1), rtol=bound, atol=1e-8)


@pytest.mark.parametrize("bad", (NAN, INF), ids=("nan", "inf"))
@pytest.mark.parametrize("at", (0, 5, BLOCKS - 1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_logit_that_is_no_number_reaches_output_and_mass(bad, at, dtype):
    q, kv = problem([2.0 * i for i in range(BLOCKS)], dtype)
    kv.k[:, :, at * BLOCK + 9, 0] = bad
    visual = vp.VisualTokens.from_spans([[(40, 300)]])
    config = vp.PulseConfig(ratio=(0.1, 0.4), anchor_output="dense")
    _, mass, mean = vp.score(q, kv, visual, config, scale=1.0, backend="cpu")
    assert vp.attend(q, kv, scale=1.0, backend="cpu").isnan().all()
    assert mass.isnan().all()
    assert mean.isnan().all()
