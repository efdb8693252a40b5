"""Every registered backend against the contract, case by case."""

import dataclasses
import itertools
from functools import cache

import pytest
import torch

import visionpulse as vp
from visionpulse import ops
from visionpulse.backends import get
from visionpulse.testing import (
    CASES,
    Case,
    assert_masses,
    assert_scores,
    assert_valid_selection,
)
from visionpulse.testing.compare import Exact, assert_counts
from visionpulse.testing.draw import Draws

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = tuple(
    itertools.product(("prob", "logit", "prob_tau"), ("max", "mean"), ("pruned", "dense"))
)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)
HEAD_DIMS = (16, 40, 64, 72, 80, 96, 128, 192, 256)
TWO_SPANS = ((4, 30), (37, 80))

by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@by_case
@by_dtype
def test_decode_is_the_contract(backend, device, case, dtype, check_decode):
    check_decode(case.build(dtype, device), backend)


@by_case
def test_a_dense_anchor_gives_the_dense_output(backend, device, case, check_decode):
    config = case.config.updated(anchor_output="dense")
    check_decode(case.build(torch.float32, device), backend, config)


@pytest.mark.parametrize("score, mass, anchor_output", OPTIONS)
@pytest.mark.parametrize("name", ("ragged", "paged-hnd", "group5"))
def test_options_combine(backend, device, name, score, mass, anchor_output, check_decode):
    config = vp.PulseConfig(
        tau=0.3, ratio=(0.02, 0.6), score=score, mass=mass, anchor_output=anchor_output
    )
    check_decode(CASES[name].build(torch.bfloat16, device), backend, config)


@pytest.mark.parametrize("group", GROUPS)
def test_any_group_size(backend, device, group, check_decode):
    case = Case("", (TWO_SPANS,), heads=2 * group, kv_heads=2, head_dim=64)
    check_decode(case.build(torch.bfloat16, device), backend)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@by_dtype
def test_any_head_dim(backend, device, head_dim, dtype, check_decode):
    case = Case("", (TWO_SPANS,), heads=4, kv_heads=1, head_dim=head_dim, layout="unaligned")
    check_decode(case.build(dtype, device), backend)


@by_case
@by_dtype
def test_stages_are_the_contract(backend, device, case, dtype, params_of, check_output):
    problem = case.build(dtype, device)
    q, kv, visual, config = problem.q, problem.kv, problem.visual, problem.config
    scores, mass, mass_mean = vp.score(q, kv, visual, config, backend=backend, **case.options)
    exact = Exact.of(problem, params_of(problem))
    assert_scores(scores, exact)
    assert_masses(mass, mass_mean, exact)
    selection = vp.select(
        scores,
        mass,
        visual,
        config,
        mass_mean=mass_mean,
        starts=kv.starts,
        lengths=kv.lengths,
        window=case.options.get("window"),
        backend=backend,
    )
    assert_counts(selection, exact.n_visual, exact.params)
    assert_valid_selection(selection, scores, exact.candidate)
    out = vp.attend(q, kv, visual, selection, backend=backend, **case.options)
    check_output(out, exact, selection, backend)


@by_case
@by_dtype
def test_dense_decode_is_the_contract(backend, device, case, dtype, params_of, check_output):
    problem = case.build(dtype, device)
    out = vp.attend(problem.q, problem.kv, backend=backend, **case.options)
    exact = Exact.of(problem, params_of(problem))
    check_output(out, exact, None, backend)


def test_a_follower_leaves_out_what_its_window_hides(backend, device, params_of, check_output):
    """The anchor chose without a window; the follower has one."""
    problem = CASES["grouped"].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    _, selection = vp.decode(q, kv, visual, problem.config, backend=backend)
    out = vp.attend(q, kv, visual, selection, window=40, backend=backend)
    params = params_of(problem)._replace(window=40)
    check_output(out, Exact.of(problem, params), selection, backend)


@cache
def used_workspace(backend, device):
    """One in which other problems left their numbers."""
    workspace = vp.Workspace()
    for name in ("ragged", "long"):
        noise = CASES[name].build(torch.bfloat16, device, seed=7)
        vp.decode(noise.q, noise.kv, noise.visual, workspace=workspace, backend=backend)
    return workspace


@pytest.mark.bits
@by_case
def test_two_runs_give_the_same_bits(backend, device, case, check_decode):
    problem = case.build(torch.bfloat16, device)
    first = check_decode(problem, backend)
    dirty = used_workspace(backend, device)
    out, again = vp.decode(
        *problem[1:4], problem.config, workspace=dirty, backend=backend, **case.options
    )
    assert_same_bits(out, first[0])
    for field in ("indices", "counts", "mass", "mass_mean"):
        assert_same_bits(getattr(again, field), getattr(first[1], field))


def assert_same_bits(a, b):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def row_of(problem, b):
    """One row of a contiguous problem, alone."""
    kv = problem.kv
    cut = [None if t is None else t[b : b + 1] for t in (kv.lengths, kv.starts)]
    return problem.q[b : b + 1], vp.KVCache(kv.k[b : b + 1], kv.v[b : b + 1], *cut)


@pytest.mark.bits
@pytest.mark.parametrize("name", ("ragged", "left-padding", "grouped", "long", "softcap"))
@by_dtype
def test_a_row_does_not_depend_on_its_neighbours(backend, device, name, dtype):
    """Nor on the slots behind its length, nor on the width of the index buffer."""
    case = CASES[name]
    problem = case.build(dtype, device)
    out, selection = vp.decode(
        problem.q, problem.kv, problem.visual, problem.config, backend=backend, **case.options
    )
    dense = vp.attend(problem.q, problem.kv, backend=backend, **case.options)
    follow = vp.attend(
        problem.q, problem.kv, problem.visual, selection, backend=backend, **case.options
    )
    for b in range(case.rows):
        q, kv = row_of(problem, b)
        length = case.size if case.lengths is None else case.lengths[b]
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, 50), value=torch.nan) for t in (kv.k, kv.v))
        lengths = torch.tensor([length], dtype=torch.int32, device=device)
        kv = vp.KVCache(k, v, lengths, kv.starts)
        visual = vp.VisualTokens.from_spans([case.visual[b]], capacity=2000, device=device)
        alone, chosen = vp.decode(q, kv, visual, problem.config, backend=backend, **case.options)
        count = int(chosen.counts)
        assert_same_bits(alone[0], out[b])
        assert_same_bits(chosen.mass, selection.mass[b : b + 1])
        assert_same_bits(chosen.mass_mean, selection.mass_mean[b : b + 1])
        assert count == int(selection.counts[b])
        assert torch.equal(chosen.indices[0, :count], selection.indices[b, :count])
        assert_same_bits(vp.attend(q, kv, backend=backend, **case.options)[0], dense[b])
        again = vp.attend(q, kv, visual, chosen, backend=backend, **case.options)
        assert_same_bits(again[0], follow[b])


@pytest.mark.bits
@pytest.mark.parametrize("layout", ("NHD", "HND"))
@pytest.mark.parametrize("page", (1, 5, 16, 128))
def test_pages_do_not_change_the_bits(backend, device, layout, page, check_decode):
    plain = CASES["ragged"]
    paged = dataclasses.replace(plain, layout=layout, page=page)
    results = [
        (*check_decode(case.build(torch.bfloat16, device), backend)[:2],)
        for case in (dataclasses.replace(plain, layout="unaligned"), paged)
    ]
    assert_same_bits(results[0][0], results[1][0])
    assert torch.equal(results[0][1].indices, results[1][1].indices)
    assert_same_bits(results[0][1].mass, results[1][1].mass)


@pytest.mark.bits
@by_dtype
def test_layers_that_share_a_record_have_the_bits_of_layers_alone(backend, device, dtype):
    """A token's keys and values of three layers side by side, as one transfer would bring them."""
    problem = CASES["ragged"].build(dtype, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    batch, kv_heads, capacity, head_dim = kv.k.shape
    records = torch.full((batch, capacity, 3, 2, kv_heads, head_dim), torch.nan, device=device)
    records = records.to(dtype)
    records[:, :, 1, 0], records[:, :, 1, 1] = kv.k.transpose(1, 2), kv.v.transpose(1, 2)
    k, v = (records[:, :, 1, i].transpose(1, 2) for i in (0, 1))
    shared = vp.KVCache(k, v, kv.lengths, kv.starts)
    alone = vp.KVCache(kv.k.contiguous(), kv.v.contiguous(), kv.lengths, kv.starts)
    results = [
        vp.decode(q, one, visual, problem.config, backend=backend) for one in (shared, alone)
    ]
    assert_same_bits(results[0][0], results[1][0])
    assert torch.equal(results[0][1].indices, results[1][1].indices)
    selection = results[1][1]
    followed = [vp.attend(q, one, visual, selection, backend=backend) for one in (shared, alone)]
    assert_same_bits(*followed)


@pytest.mark.bits
@pytest.mark.parametrize("score", ("prob", "logit", "prob_tau"))
@by_dtype
def test_equal_logits_have_equal_score_bits(backend, device, score, dtype):
    """Wherever they lie: the keys repeat with a period that fits no tile."""
    case = Case("", (((3, 290),),), size=300, heads=12, kv_heads=2, values="ties")
    problem = case.build(dtype, device)
    scores = torch.empty(1, 300, device=device)
    config = problem.config.updated(score=score)
    vp.decode(problem.q, problem.kv, problem.visual, config, scores=scores, backend=backend)
    for first in range(3):
        same = scores[0, 3 + first : 290 : 3]
        assert_same_bits(same, same[:1].expand_as(same))


def test_keeping_all_is_dense_attention(backend, device, params_of, check_output):
    problem = CASES["keep-all"].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    out, selection = vp.decode(q, kv, visual, problem.config, backend=backend)
    assert torch.equal(selection.counts, visual.counts)
    exact = Exact.of(problem, params_of(problem))
    check_output(out, exact, None, backend)
    check_output(vp.attend(q, kv, visual, selection, backend=backend), exact, None, backend)


def test_a_given_output_is_filled(backend, device, params_of, check_output):
    """Strided, with poison around it that stays."""
    problem = CASES["grouped"].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    exact = Exact.of(problem, params_of(problem))
    memory = torch.full((q.shape[0], q.shape[1], q.shape[2] + 7), 7.0, device=device)
    view = memory[:, :, 3:-4]
    got, selection = vp.decode(q, kv, visual, problem.config, out=view, backend=backend)
    assert got is view
    check_output(view, exact, selection, backend)
    assert (memory[:, :, :3] == 7).all() and (memory[:, :, -4:] == 7).all()
    view.fill_(7)
    vp.attend(q, kv, visual, selection, out=view, backend=backend)
    check_output(view, exact, selection, backend)
    assert (memory[:, :, :3] == 7).all() and (memory[:, :, -4:] == 7).all()


def test_inputs_are_left_alone(backend, device, check_decode):
    problem = CASES["paged-hnd"].build(torch.float32, device)
    kv, visual = problem.kv, problem.visual
    tensors = (
        problem.q, kv.k_pages, kv.v_pages, kv.block_table, kv.lengths, kv.starts,
        visual.spans, visual.offsets, visual.counts,
    )  # fmt: skip
    before = [t.clone() for t in tensors]
    check_decode(problem, backend)
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now.nan_to_num(9), then.nan_to_num(9))


SCORE_ROWS = {
    "normal": lambda draws, n: draws.normal(n),
    "tiny": lambda draws, n: draws.uniform(n) * 1e-38,
    "two-valued": lambda draws, n: draws.integers(0, 2, n).float(),
    "close": lambda draws, n: 1.0 + draws.integers(0, 40, n) * 2.0**-23,
    "zeros-of-both-signs": lambda draws, n: torch.where(draws.uniform(n) < 0.5, 0.0, -0.0),
    "infinities": lambda draws, n: draws.integers(-1, 2, n).float() / 0.0,
    "with-nan": lambda draws, n: torch.where(draws.uniform(n) < 0.3, torch.nan, draws.normal(n)),
    "all-nan": lambda draws, n: torch.full((n,), torch.nan),
    "negative": lambda draws, n: -draws.uniform(n) * 1e30,
}


@pytest.mark.parametrize("kind", SCORE_ROWS)
@pytest.mark.parametrize("size, k", ((1, 1), (7, 3), (300, 17), (300, 299), (2500, 700)))
def test_select_is_exact(backend, device, kind, size, k):
    """Given any scores: the K largest, lowest position first, NaN last."""
    draws = Draws(size * 31 + k)
    scores = torch.stack([SCORE_ROWS[kind](draws, size) for _ in range(3)]).to(device)
    mask = (draws.uniform(3, size) < 0.9).to(device)
    visual = vp.VisualTokens.from_mask(mask)
    mass = torch.tensor([0.1, k / size, 1.0], device=device)
    config = vp.PulseConfig(ratio=(0.0, 1.0))
    selection = vp.select(scores, mass, visual, config, backend=backend)
    params = ops.budget(ops.Params(1.0), config, visual, 3, scores.device)[0]
    assert_counts(selection, visual.counts, params)
    assert_valid_selection(selection, scores, mask)


@pytest.mark.parametrize("ratio", ((0.0, 0.0), (0.05, 0.1), (0.3, 0.3), (1.0, 1.0)))
@pytest.mark.parametrize("mass", (0.0, 0.05, 0.07, 0.1, 0.5, 1.0, 1.5, float("nan")))
def test_the_count_follows_the_mass_bit_for_bit(backend, device, ratio, mass):
    sizes = (0, 1, 2, 9, 10, 11, 99, 100)
    visual = vp.VisualTokens.from_spans([((0, n),) if n else () for n in sizes], device=device)
    scores = Draws(0).uniform(len(sizes), 128).to(device)
    masses = torch.full((len(sizes),), mass, device=device)
    config = vp.PulseConfig(ratio=ratio)
    selection = vp.select(scores, masses, visual, config, backend=backend)
    r = torch.tensor(mass).nan_to_num(ratio[1]).clamp(*ratio)
    for n, count in zip(sizes, selection.counts.tolist(), strict=True):
        wanted = min(max(int(torch.floor(r * torch.tensor(float(n)))), 1), n)
        assert count == wanted, (n, count, wanted)


POLICIES = {
    "fixed": vp.Fixed(0.2),
    "random": vp.Random(seed=3),
    "top-k": vp.TopK(9),
    "top-p": vp.TopP(0.4),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("anchor_output", ("pruned", "dense"))
def test_every_budget_runs(backend, device, policy, anchor_output, params_of, check_output):
    problem = CASES["ragged"].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    config = vp.PulseConfig(ratio=(0.1, 0.4), budget=policy, anchor_output=anchor_output)
    scores = torch.empty(kv.batch, kv.capacity, device=device)
    out, selection = vp.decode(q, kv, visual, config, scores=scores, backend=backend)
    exact = Exact.of(problem, params_of(problem, config))
    assert_valid_selection(selection, scores, exact.candidate)
    check_output(out, exact, selection if anchor_output == "pruned" else None, backend)
    n = exact.n_visual
    if isinstance(policy, vp.TopK):
        assert torch.equal(selection.counts, n.clamp(max=9))
    elif isinstance(policy, vp.Fixed):
        assert torch.equal(selection.counts, (n * 0.2).floor().int().clamp(min=1).minimum(n))
    elif isinstance(policy, vp.Random):
        assert (selection.counts >= (n * 0.1).floor().clamp(min=1)).all()
        assert (selection.counts <= (n * 0.4).floor().clamp(min=1)).all()
    else:
        for b, count in enumerate(selection.counts.tolist()):
            best = scores[b][exact.candidate[b]].double().sort(descending=True).values.cumsum(0)
            low, high = (int((best < 0.4 + e).sum()) + 1 for e in (-1e-6, 1e-6))
            assert min(low, int(n[b])) <= count <= min(high, int(n[b]))


def test_a_named_backend_is_obeyed(backend):
    assert get(backend).name == backend
