"""The reference against a transcription of the contract that shares no code with it.

`step` below is written row by row, head by head and key by key from the text of the contract, in
Python floats, which are float64. Where both agree on random problems, one of two independent
readings would have to be wrong in the same way.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import visionpulse as vp
from visionpulse.testing.draw import Draws


def visible_keys(length, start, window):
    low = start if window is None else max(start, length - window)
    return list(range(low, length))


def softmax(values):
    """Probabilities of a list of logits, by the definition."""
    if not values:
        return []
    if any(math.isnan(v) for v in values):
        return [math.nan] * len(values)
    largest = max(values)
    weights = [math.exp(v - largest) for v in values]
    total = math.fsum(weights)
    return [w / total for w in weights]


def logits(q_head, keys, scale, softcap):
    z = [scale * math.fsum(a * b for a, b in zip(q_head, key, strict=True)) for key in keys]
    return z if softcap is None else [softcap * math.tanh(v / softcap) for v in z]


def count(mass, n_visual, ratio):
    """Section 2.3, in float32 where the contract says float32."""
    low, high = ratio
    r = high if math.isnan(mass) else min(max(mass, low), high)
    if n_visual == 0:
        return 0
    return min(max(int(np.floor(np.float32(r) * np.float32(n_visual))), 1), n_visual)


def step(q, k, v, length, start, is_visual, config, scale=None, softcap=None, window=None):
    """One row: q [H][D], k and v [G][N][D] as nested lists; gives a dict of everything."""
    heads, kv_heads, dim = len(q), len(k), len(q[0])
    scale = dim**-0.5 if scale is None else scale
    visible = visible_keys(length, start, window)
    visual = [n for n in visible if n < len(is_visual) and is_visual[n]]
    z = []
    for h, q_head in enumerate(q):
        keys = k[h // (heads // kv_heads)]
        z.append(logits(q_head, [keys[n] for n in visible], scale, softcap))
    p = [softmax(row) for row in z]
    p_tau = [softmax([value / config.tau for value in row]) for row in z]
    where = {n: i for i, n in enumerate(visible)}
    per_head = [math.fsum(row[where[n]] for n in visual) for row in p_tau]
    spoiled = any(math.isnan(m) for m in per_head)
    mass = math.nan if spoiled else max(per_head)
    mean = math.nan if spoiled else math.fsum(per_head) / heads
    kept = count(mass if config.mass == "max" else mean, len(visual), config.ratio)
    source = {"prob": p, "logit": z, "prob_tau": p_tau}[config.score]
    score = {n: math.fsum(row[where[n]] for row in source) / heads for n in visual}

    def rank(n):
        return (math.isnan(score[n]), -score[n] if not math.isnan(score[n]) else 0.0, n)

    chosen = sorted(sorted(visual, key=rank)[:kept])
    attended = [n for n in visible if n not in visual or n in chosen]
    out = []
    for h in range(heads):
        keys = visible if config.anchor_output == "dense" else attended
        weights = softmax([z[h][where[n]] for n in keys])
        values = v[h // (heads // kv_heads)]
        pairs = [(w, values[n]) for w, n in zip(weights, keys, strict=True)]
        out.append([math.fsum(w * value[d] for w, value in pairs) for d in range(dim)])
    return {"out": out, "chosen": chosen, "mass": mass, "mean": mean, "score": score}


configs = st.builds(
    vp.PulseConfig,
    tau=st.sampled_from([0.1, 0.4, 1.0, 2.0]),
    ratio=st.sampled_from([(0.0, 0.0), (0.05, 0.1), (0.01, 0.05), (0.2, 0.9), (1.0, 1.0), (0, 1)]),
    mass=st.sampled_from(["max", "mean"]),
    score=st.sampled_from(["prob", "logit", "prob_tau"]),
    anchor_output=st.sampled_from(["pruned", "dense"]),
)


@st.composite
def problems(draw):
    """A valid call: shapes, cut, visual set, options, and a seed for the numbers."""
    rows, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, size = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(0, size), min_size=rows, max_size=rows))
    starts = [draw(st.integers(0, size)) for _ in range(rows)]
    return {
        "shape": (rows, kv_heads, group, size, draw(st.sampled_from([1, 4, 8, 24]))),
        "lengths": draw(st.sampled_from([None, lengths])),
        "starts": draw(st.sampled_from([None, starts])),
        "mask": draw(
            st.lists(
                st.lists(st.booleans(), min_size=size, max_size=size),
                min_size=rows,
                max_size=rows,
            )
        ),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "window": draw(st.sampled_from([None, 1, 7])),
        "scale": draw(st.sampled_from([None, 1.0])),
        "levels": draw(st.sampled_from([0, 1, 2])),  # values rounded to few levels tie a lot
        "page": draw(st.sampled_from([0, 1, 3, 8])),
        "nan": draw(st.sampled_from([None, None, 0, size // 2, size - 1])),  # a key of row 0
        "seed": draw(st.integers(0, 2**31)),
    }


def numbers(spec):
    draws = Draws(spec["seed"])
    rows, kv_heads, group, size, dim = spec["shape"]

    def fresh(*shape):
        t = draws.normal(*shape, dtype=torch.float64)
        return t if spec["levels"] == 0 else (t * spec["levels"]).round()

    q = fresh(rows, kv_heads * group, dim)
    k, v = fresh(rows, kv_heads, size, dim), fresh(rows, kv_heads, size, dim)
    if spec["nan"] is not None:
        k[0, 0, spec["nan"]] = torch.nan
    return q, k, v


def cache_of(spec, k, v):
    rows, _, _, size, _ = spec["shape"]
    lengths, starts = (
        None if spec[name] is None else torch.tensor(spec[name], dtype=torch.int32)
        for name in ("lengths", "starts")
    )
    page = spec["page"]
    if not page:
        return vp.KVCache(k, v, lengths, starts)
    pages = -(-size // page)
    table = Draws(spec["seed"]).permutation(rows * pages).to(torch.int32).view(rows, pages)
    pool = []
    for t in (k, v):
        whole = torch.nn.functional.pad(t, (0, 0, 0, pages * page - size), value=torch.nan)
        cut = (
            whole.unflatten(2, (pages, page)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        )  # [.., page, G, D]
        pool.append(torch.empty_like(cut).index_copy_(0, table.flatten().long(), cut.contiguous()))
    if lengths is None:
        lengths = torch.full((rows,), size, dtype=torch.int32)
    return vp.PagedKVCache(pool[0], pool[1], table, lengths, starts)


@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(spec=problems(), config=configs)
def test_the_reference_is_the_transcription(spec, config):
    q, k, v = numbers(spec)
    rows, _, _, size, _ = spec["shape"]
    kv = cache_of(spec, k, v)
    visual = vp.VisualTokens.from_mask(torch.tensor(spec["mask"]))
    options = {name: spec[name] for name in ("scale", "softcap", "window")}
    scores = torch.empty(rows, kv.capacity, dtype=torch.float64)
    out, selection = vp.decode(q, kv, visual, config, scores=scores, backend="reference", **options)
    for b in range(rows):
        length = size if spec["lengths"] is None else spec["lengths"][b]
        start = 0 if spec["starts"] is None else spec["starts"][b]
        wanted = step(
            q[b].tolist(), k[b].tolist(), v[b].tolist(), length, start, spec["mask"][b],
            config, **options,
        )  # fmt: skip
        close = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
        torch.testing.assert_close(
            out[b], torch.tensor(wanted["out"], dtype=torch.float64), **close
        )
        assert selection.mass[b].item() == near(wanted["mass"])
        assert selection.mass_mean[b].item() == near(wanted["mean"])
        for n, value in wanted["score"].items():
            assert scores[b, n].item() == near(value)
        chosen = same_ties(wanted, scores[b], selection.counts[b])
        assert selection.indices[b, : selection.counts[b]].tolist() == chosen


def near(value):
    return pytest.approx(value, rel=1e-10, abs=1e-12, nan_ok=True)


def same_ties(wanted, scores, count):
    """The transcription's choice, with ties read from the very scores that were ranked.

    Two sums that are equal on paper may differ in the last bit; only then do the choices differ.
    """
    assert int(count) == len(wanted["chosen"])

    def rank(n):
        value = scores[n].item()
        return (math.isnan(value), 0.0 if math.isnan(value) else -value, n)

    chosen = sorted(sorted(wanted["score"], key=rank)[: int(count)])
    for n, other in zip(*(sorted(set(a) - set(b)) for a, b in _both(chosen, wanted)), strict=True):
        assert wanted["score"][n] == near(wanted["score"][other])
    return chosen


def _both(chosen, wanted):
    return (chosen, wanted["chosen"]), (wanted["chosen"], chosen)


BREAKS = {
    "a longer length": lambda kv, q, s: (vp.KVCache(kv.k, kv.v, rows(s, s["shape"][3] + 1)), q),
    "a negative length": lambda kv, q, s: (vp.KVCache(kv.k, kv.v, rows(s, -1)), q),
    "one more row": lambda kv, q, s: (kv, torch.cat([q, q])),
    "a wider head": lambda kv, q, s: (kv, torch.cat([q, q], dim=2)),
    "another dtype": lambda kv, q, s: (kv, q.to(torch.bfloat16)),
    "another rank": lambda kv, q, s: (kv, q[None]),
}


def rows(spec, value):
    return torch.full((spec["shape"][0],), value, dtype=torch.int32)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=problems(), config=configs, broken=st.sampled_from(sorted(BREAKS)))
def test_a_broken_call_is_refused_before_it_writes(spec, config, broken):
    spec = spec | {"page": 0, "lengths": None, "starts": None}
    q, k, v = numbers(spec)
    kv, q = BREAKS[broken](vp.KVCache(k.contiguous(), v), q, spec)
    visual = vp.VisualTokens.from_mask(torch.tensor(spec["mask"]))
    out = torch.full_like(q, 7.0)
    with pytest.raises((ValueError, TypeError)):
        vp.decode(q, kv, visual, config, out=out, backend="reference")
    assert (out == 7).all()


def test_float64_inputs_stay_in_float64():
    draws = Draws(0)
    q = draws.normal(1, 4, 8, dtype=torch.float64)
    k, v = (draws.normal(1, 2, 30, 8, dtype=torch.float64) for _ in range(2))
    visual = vp.VisualTokens.from_spans([[(3, 25)]])
    out, selection = vp.decode(q, vp.KVCache(k, v), visual, vp.PulseConfig(ratio=(1.0, 1.0)))
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)
    torch.testing.assert_close(out, dense[:, :, 0], rtol=1e-12, atol=1e-12)
    assert selection.mass.dtype == torch.float64
