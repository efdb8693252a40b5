"""Several queries of a row: each is a decode step of its own, on every backend."""

import dataclasses

import pytest
import torch

import visionpulse as vp
from visionpulse import queries
from visionpulse.backends import get
from visionpulse.testing import QUERY_CASES, Case, assert_masses, assert_scores
from visionpulse.testing.compare import Exact, assert_counts, assert_valid_selection

DTYPES = (torch.float32, torch.bfloat16)
TWO_SPANS = ((4, 30), (37, 80))

by_case = pytest.mark.parametrize("case", QUERY_CASES.values(), ids=QUERY_CASES.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def options_of(problem, backend):
    return {"q_counts": problem.q_counts, "backend": backend, **problem.case.options}


@by_case
@by_dtype
def test_decode_is_the_contract_of_each_query(backend, device, case, dtype, check_decode):
    check_decode(case.build(dtype, device), backend)


@by_case
def test_a_dense_anchor_gives_the_dense_output(backend, device, case, check_decode):
    config = case.config.updated(anchor_output="dense")
    check_decode(case.build(torch.float32, device), backend, config)


@pytest.mark.parametrize("score", ("prob", "logit", "prob_tau"))
@pytest.mark.parametrize("mass", ("max", "mean"))
def test_options_combine(backend, device, score, mass, check_decode):
    config = vp.PulseConfig(tau=0.3, ratio=(0.02, 0.6), score=score, mass=mass)
    check_decode(QUERY_CASES["paged-counts"].build(torch.bfloat16, device), backend, config)


@by_case
def test_stages_are_the_contract_of_each_query(backend, device, case, params_of, check_output):
    problem = case.build(torch.bfloat16, device)
    q, kv, visual, config = problem.q, problem.kv, problem.visual, problem.config
    options = options_of(problem, backend)
    scores, mass, mass_mean = vp.score(q, kv, visual, config, **options)
    assert scores.shape == (*q.shape[:2], kv.capacity) and mass.shape == q.shape[:2]
    selection = vp.select(
        scores, mass, visual, config, mass_mean=mass_mean, starts=kv.starts, lengths=kv.lengths,
        window=case.options.get("window"), q_counts=problem.q_counts, backend=backend,
    )  # fmt: skip
    out = vp.attend(q, kv, visual, selection, **options)
    dense = vp.attend(q, kv, **options)
    for i, (rows, one) in enumerate(problem.one_by_one()):
        exact, chosen = Exact.of(one, params_of(problem)), selection.rows(rows)
        assert_scores(scores[:, i], exact)
        assert_masses(mass[:, i], mass_mean[:, i], exact)
        assert_counts(chosen, exact.n_visual, exact.params)
        assert_valid_selection(chosen, scores[:, i], exact.candidate)
        check_output(out[:, i], exact, chosen, backend)
        check_output(dense[:, i], exact, None, backend)


@pytest.mark.parametrize(
    "group, count", ((1, 16), (2, 9), (3, 16), (6, 3), (7, 10), (8, 9), (12, 6), (16, 4), (32, 3))
)
def test_any_group_size(backend, device, group, count, check_decode):
    case = Case("", (TWO_SPANS,), queries=count, heads=2 * group, kv_heads=2)
    check_decode(case.build(torch.bfloat16, device), backend)


def test_a_query_that_is_not_real_gives_zeros(backend, device):
    problem = QUERY_CASES["counts"].build(torch.float32, device)
    options = options_of(problem, backend)
    out, selection = vp.decode(problem.q, problem.kv, problem.visual, problem.config, **options)
    dense = vp.attend(problem.q, problem.kv, **options)
    for b, count in enumerate(problem.case.q_counts):
        unreal = 6 - count
        assert not out[b, :unreal].any() and not dense[b, :unreal].any()
        assert not selection.counts.view(4, 6)[b, :unreal].any()
        assert not selection.mass.view(4, 6)[b, :unreal].any()
        assert dense[b, unreal:].any(-1).all()


@pytest.mark.bits
@pytest.mark.parametrize("name", ("ragged", "left-padding", "window", "paged-nhd", "long"))
@by_dtype
def test_one_query_gives_the_bits_of_the_call_without_that_axis(backend, device, name, dtype):
    case = dataclasses.replace(QUERY_CASES[name], queries=1)
    problem = case.build(dtype, device)
    q, kv, visual, config = problem.q, problem.kv, problem.visual, problem.config
    options = options_of(problem, backend)
    counted = options | {"q_counts": torch.ones(case.rows, dtype=torch.int32, device=device)}
    wanted = everything(q[:, 0], kv, visual, config, options)
    for several in (options, counted):
        for got, one in zip(everything(q, kv, visual, config, several), wanted, strict=True):
            assert torch.equal(got.view(one.shape).nan_to_num(7), one.nan_to_num(7))


def everything(q, kv, visual, config, options):
    """All tensors that the ops give."""
    scores = torch.empty(*q.shape[:-2], kv.capacity, device=q.device)
    out, selection = vp.decode(q, kv, visual, config, scores=scores, **options)
    follow = vp.attend(q, kv, visual, selection, **options)
    dense = vp.attend(q, kv, **options)
    staged, mass, mean = vp.score(q, kv, visual, config, **options)
    chosen = (selection.indices, selection.counts, selection.mass, selection.mass_mean)
    return out, follow, dense, scores, staged, mass, mean, *chosen


@pytest.mark.bits
@pytest.mark.parametrize("name", ("ragged", "counts", "window", "picture-at-the-end", "long"))
@by_dtype
def test_a_row_does_not_depend_on_its_neighbours(backend, device, name, dtype):
    """Nor on the slots behind its length, and a second run gives the same bits."""
    case = QUERY_CASES[name]
    problem = case.build(dtype, device)
    q, kv, visual, config = problem.q, problem.kv, problem.visual, problem.config
    options = options_of(problem, backend)
    together = everything(q, kv, visual, config, options)
    for got, again in zip(together, everything(q, kv, visual, config, options), strict=True):
        assert torch.equal(got.nan_to_num(7), again.nan_to_num(7))
    out, follow, dense, *_, indices, counts, mass, _ = together
    for b in range(case.rows):
        k, v = (
            torch.nn.functional.pad(t[b : b + 1], (0, 0, 0, 50), value=torch.nan)
            for t in (kv.k, kv.v)
        )
        lengths = torch.full((1,), (case.lengths or (case.size,) * case.rows)[b]).int()
        alone = vp.KVCache(k, v, lengths.to(device))
        spans = vp.VisualTokens.from_spans([case.visual[b]], capacity=2000, device=device)
        cut = options | {
            "q_counts": None if problem.q_counts is None else problem.q_counts[b : b + 1]
        }
        one = everything(q[b : b + 1], alone, spans, config, cut)
        assert torch.equal(one[0][0], out[b])
        assert torch.equal(one[1][0], follow[b])
        assert torch.equal(one[2][0], dense[b])
        rows = slice(b * case.queries, (b + 1) * case.queries)
        assert torch.equal(one[-3], counts[rows]) and torch.equal(one[-2], mass[rows])
        width = int(counts[rows].max())
        assert torch.equal(one[-4][:, :width], indices[rows, :width])


def test_a_follower_leaves_out_what_its_window_hides(backend, device, params_of, check_output):
    problem = QUERY_CASES["two"].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    _, selection = vp.decode(q, kv, visual, problem.config, backend=backend)
    out = vp.attend(q, kv, visual, selection, window=40, backend=backend)
    for i, (rows, one) in enumerate(problem.one_by_one()):
        exact = Exact.of(one, params_of(problem)._replace(window=40))
        check_output(out[:, i], exact, selection.rows(rows), backend)


@pytest.mark.parametrize("flat", (True, False), ids=("packed", "transposed"))
def test_a_given_output_is_filled(backend, device, flat):
    """Strided, with poison around it that stays."""
    problem = QUERY_CASES["two"].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    wanted, selection = vp.decode(q, kv, visual, problem.config, backend=backend)
    rows, count, heads, dim = q.shape
    shape = (rows, count, heads) if flat else (rows, heads, count)
    memory = torch.full((*shape, dim + 7), 7.0, device=device)
    view = memory[..., 3:-4] if flat else memory[..., 3:-4].transpose(1, 2)
    got, _ = vp.decode(q, kv, visual, problem.config, out=view, backend=backend)
    assert got is view and torch.equal(view, wanted)
    view.fill_(7)
    assert vp.attend(q, kv, visual, selection, out=view, backend=backend) is view
    assert torch.allclose(view, wanted, atol=1e-5)
    assert (memory[..., :3] == 7).all() and (memory[..., -4:] == 7).all()


POLICIES = (vp.Fixed(0.2), vp.Random(seed=3), vp.TopK(9), vp.TopP(0.4))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_every_budget_runs_for_each_query(backend, device, policy, params_of, check_output):
    problem = QUERY_CASES["picture-at-the-end"].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    config = vp.PulseConfig(ratio=(0.1, 0.4), budget=policy)
    scores = torch.empty(*q.shape[:2], kv.capacity, device=device)
    out, selection = vp.decode(q, kv, visual, config, scores=scores, backend=backend)
    for i, (rows, one) in enumerate(problem.one_by_one()):
        exact, chosen = Exact.of(one, params_of(one, config)), selection.rows(rows)
        assert_valid_selection(chosen, scores[:, i], exact.candidate)
        check_output(out[:, i], exact, chosen, backend)
        n = exact.n_visual
        if isinstance(policy, vp.TopK):
            assert torch.equal(chosen.counts, n.clamp(max=9))
        elif isinstance(policy, vp.Fixed):
            assert torch.equal(chosen.counts, (n * 0.2).floor().int().clamp(min=1).minimum(n))


FAULTS = {
    "a query sees the key behind its own": 1,
    "a query does not see its own key": -1,
}


@pytest.mark.parametrize("shift", FAULTS.values(), ids=FAULTS.keys())
def test_a_tail_off_by_one_is_seen(monkeypatch, shift, check_decode):
    right = queries.lengths_of

    def off(*args):
        lengths = right(*args)
        return torch.where(lengths > 0, lengths + shift, lengths)

    monkeypatch.setattr(queries, "lengths_of", off)
    problem = QUERY_CASES["ragged"].build(torch.float32)
    kv = vp.KVCache(problem.kv.k, problem.kv.v, problem.kv.lengths - 1)
    with pytest.raises(AssertionError):
        check_decode(problem._replace(kv=kv, case=shorter(problem.case)), "reference")


def shorter(case):
    return dataclasses.replace(case, lengths=tuple(length - 1 for length in case.lengths))


def test_it_is_said_when_queries_are_served_one_by_one():
    problem = QUERY_CASES["two"].build(torch.float32)
    q, kv, visual = problem.q, problem.kv, problem.visual
    for name in ("cpu", "reference"):
        said = str(vp.explain(q, kv, visual, backend=name))
        one_by_one = get(name).max_queries < 2
        assert ("its 2 queries of a row one by one" in said) == one_by_one
        assert "one by one" not in str(vp.explain(q[:, 0], kv, visual, backend=name))


def test_auto_prefers_a_backend_whose_kernels_take_all_queries(monkeypatch):
    from visionpulse import backends

    device = torch.device("cuda")
    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(get(name)), "unavailable", lambda self: None)
    monkeypatch.setattr(type(get("triton")), "max_queries", 16)
    monkeypatch.setattr(type(get("cuda")), "max_queries", 1)

    def chosen(queries, reason=None):
        against = {"triton": reason}
        return backends.resolve("auto", device, lambda b: against.get(b.name), queries).name

    assert chosen(None) == chosen(1) == "cuda"
    assert chosen(4) == "triton"
    assert chosen(4, "not this dtype") == "cuda"
