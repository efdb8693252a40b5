"""The bound on an output is sharp: the smallest faults of an attention kernel pass it by far.

Each fault is planted in the inputs of the reference, whose output is then held to the bound of the
right inputs: that of backends with float32 weights, and that of those that round them.
"""

import pytest
import torch

import visionpulse as vp
from visionpulse import ops
from visionpulse.testing.compare import Exact, output_error
from visionpulse.testing.draw import Draws

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 4
LONG = 1500  # keys; in float32 one of them still shows

by_weights = pytest.mark.parametrize("rounds_weights", (False, True), ids=("exact", "rounded"))


class Row:
    """One row, its contract, and how far a faulty output of it passes the bound."""

    def __init__(self, q, k, v, rounds_weights):
        self.q, self.k, self.v, self.rounds_weights = q, k, v, rounds_weights
        nothing = vp.VisualTokens.from_spans([()])
        params = ops.numbers(q)
        self.exact = Exact(q, vp.KVCache(k, v), nothing, params)
        self.scale = params.scale
        assert self.over(vp.KVCache(k, v)) < 0.5, "the right output has no room"

    @classmethod
    def of(cls, keys, dtype, rounds_weights):
        """A row of normal numbers."""
        draws = Draws(keys)
        q = draws.normal(1, HEADS, DIM)
        k, v = draws.normal(1, KV_HEADS, keys, DIM), draws.normal(1, KV_HEADS, keys, DIM)
        return cls(q.to(dtype), k.to(dtype), v.to(dtype), rounds_weights)

    def over(self, kv, scale=None):
        """The error of attention to `kv` instead, over the bound."""
        out = vp.attend(self.q, kv, scale=scale, backend="reference")
        return output_error(out, self.exact, None, rounds_weights=self.rounds_weights).ratio

    def keys(self, listed):
        """A cache of the listed keys."""
        return vp.KVCache(self.k[:, :, listed], self.v[:, :, listed])


# dtype, keys, step from one tried key to the next, and the least that a fault is over the bound
ROWS = (
    (torch.float32, 12, 1, 50_000.0),
    (torch.float32, LONG, 100, 500.0),
    (torch.bfloat16, 12, 1, 6.0),
    (torch.float16, 12, 1, 50.0),
)
by_row = pytest.mark.parametrize("dtype, keys, step, least", ROWS)


@by_weights
@by_row
def test_a_key_dropped_shows(dtype, keys, step, least, rounds_weights):
    row = Row.of(keys, dtype, rounds_weights)
    for n in range(0, keys, step):
        over = row.over(row.keys([i for i in range(keys) if i != n]))
        assert over > least, f"without key {n}: {over:.1f} times the bound"


@by_weights
@by_row
def test_a_key_counted_twice_shows(dtype, keys, step, least, rounds_weights):
    row = Row.of(keys, dtype, rounds_weights)
    for n in range(0, keys, step):
        over = row.over(row.keys([*range(keys), n]))
        assert over > least, f"with key {n} twice: {over:.1f} times the bound"


@by_weights
@by_row
def test_a_stale_page_shows(dtype, keys, step, least, rounds_weights):
    """A page of the table that still names what lay there before."""
    row = Row.of(keys, dtype, rounds_weights)
    pages = keys // PAGE
    old = Draws(1).normal(2, 1, PAGE, KV_HEADS, DIM).to(dtype)
    pools = [
        torch.cat([t[0].unflatten(1, (pages, PAGE)).permute(1, 2, 0, 3), before])
        for t, before in zip((row.k, row.v), old, strict=True)
    ]  # [P, page, G, D]
    lengths = torch.tensor([keys], dtype=torch.int32)
    table = torch.arange(pages, dtype=torch.int32)[None]
    assert row.over(vp.PagedKVCache(*pools, table, lengths)) < 0.5
    for n in range(0, pages, step):
        stale = table.clone()
        stale[0, n] = pages
        over = row.over(vp.PagedKVCache(*pools, stale, lengths))
        assert over > least, f"with page {n} stale: {over:.1f} times the bound"


@by_weights
@pytest.mark.parametrize("keys", (12, LONG))
def test_a_scale_off_by_a_thousandth_shows_in_float32(keys, rounds_weights):
    row = Row.of(keys, torch.float32, rounds_weights)
    over = row.over(vp.KVCache(row.k, row.v), row.scale * 1.001)
    assert over > 100, f"{over:.1f} times the bound"


@by_weights
@pytest.mark.parametrize(
    "dtype, apart, least",
    (
        (torch.float32, 6.0, {False: 1000.0, True: 1000.0}),
        (torch.float16, 6.0, {False: 1000.0, True: 4.0}),
        (torch.bfloat16, 16.0, {False: 300.0, True: 1.5}),
    ),
)
def test_a_scale_off_by_a_thousandth_shows_where_two_keys_cancel(
    dtype, apart, least, rounds_weights
):
    """Two keys whose logits lie `apart` and whose shares of the output cancel.

    The output is nearly 0, and with it its ulp; the fault moves it by apart / 2000 of the
    sum of p |v|, a weight rounded to the dtype by half an epsilon.
    """
    q, k, v = torch.zeros(1, 1, 16), torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 16)
    q[..., 0] = 4.0  # the scale is 1/4
    k[0, 0, :, 0] = torch.tensor([apart / 2, -apart / 2])
    v[0, 0, 0] = Draws(3).normal(16) / 16
    v[0, 0, 1] = -v[0, 0, 0] * torch.tensor(apart).exp()
    row = Row(q.to(dtype), k.to(dtype), v.to(dtype), rounds_weights)
    over = row.over(vp.KVCache(row.k, row.v), row.scale * 1.001)
    assert over > least[rounds_weights], f"{over:.1f} times the bound"
