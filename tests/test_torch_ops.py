"""The ops under torch.library: schemas, fakes, one graph, and the cost of a call in eager mode."""

import pytest
import torch

import visionpulse as vp
from visionpulse.call import Call, Params, Scored
from visionpulse.testing import CASES, QUERY_CASES, Half
from visionpulse.testing.draw import Draws
from visionpulse.torch_ops import arguments, fields_of

NAMES = ("grouped", "left-padding", "paged-hnd", "no-visual-at-all")


@pytest.fixture(params=NAMES)
def problem(request):
    return CASES[request.param].build(torch.float32)


PARAMS = Params(0.125, tau=0.4, r_min=0.05, r_max=0.5, k_max=43)


def opcheck(op, call, backend):
    """The checks of torch on an op, then its result."""
    op_of, given = getattr(torch.ops.visionpulse, op), arguments(op, fields_of(call), backend)
    torch.library.opcheck(op_of, given)
    return op_of(*given)


@pytest.mark.parametrize("output", ("pruned", "dense"))
def test_opcheck_decode_and_score(problem, backend, output):
    params = PARAMS._replace(anchor_output=output)
    call = Call(problem.q, problem.kv, params, problem.visual)
    opcheck("decode", call, backend)
    opcheck("score", call, backend)


def test_opcheck_select_and_attend(problem, backend):
    q, kv, visual = problem.q, problem.kv, problem.visual
    draws = Draws(0)
    scores, mass = draws.uniform(kv.batch, kv.capacity), draws.uniform(kv.batch)
    cut = (kv.starts, kv.lengths)
    scored = Scored(scores, mass, mass.clone(), visual, PARAMS, *cut)
    indices, counts = opcheck("select", scored, backend)
    selection = vp.Selection(indices, counts, mass, mass)
    opcheck("attend", Call(q, kv, PARAMS, visual, selection), backend)
    opcheck("attend_dense", Call(q, kv, PARAMS), backend)


@pytest.mark.parametrize("name", ("two", "counts", "paged-counts"))
def test_opcheck_of_several_queries(name, backend):
    problem = QUERY_CASES[name].build(torch.float32)
    q, kv, visual = problem.q, problem.kv, problem.visual
    call = Call(q, kv, PARAMS, visual, q_counts=problem.q_counts)
    _, indices, counts, mass, mean = opcheck("decode", call, backend)
    scores, *_ = opcheck(
        "score", call._replace(params=PARAMS._replace(anchor_output="dense")), backend
    )
    assert len(scores) == len(counts) == q.shape[0] * q.shape[1]
    opcheck("select", call.scored(scores, mass, mean), backend)
    selection = vp.Selection(indices, counts, mass, mean)
    opcheck("attend", call._replace(selection=selection), backend)
    opcheck("attend_dense", call._replace(visual=None), backend)


@pytest.mark.bits
def test_one_graph_gives_the_eager_bits_of_several_queries(backend):
    torch._dynamo.reset()
    problem = QUERY_CASES["paged-counts"].build(torch.float32)

    def run(q, kv, visual, q_counts):
        options = {"q_counts": q_counts, "backend": backend}
        scores, mass, _ = vp.score(q, kv, visual, **options)
        out, selection = vp.decode(q, kv, visual, vp.PulseConfig(budget=Half()), **options)
        follow = vp.attend(q, kv, visual, selection, **options)
        return scores, mass, out, follow, vp.attend(q, kv, **options), selection.indices

    given = (problem.q, problem.kv, problem.visual, problem.q_counts)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*given), run(*given), strict=True):
        assert torch.equal(got, expected)


def step(q, kv, visual, config, backend):
    """An anchor and a follower, as a model runs them."""
    out, selection = vp.decode(q, kv, visual, config, backend=backend)
    follow = vp.attend(q, kv, visual, selection, backend=backend)
    dense = vp.attend(q, kv, backend=backend)
    return out, follow, dense, selection.indices, selection.counts, selection.mass


CONFIGS = {
    "pruned": vp.PulseConfig(),
    "dense": vp.PulseConfig(anchor_output="dense", score="logit"),
    "fixed": vp.PulseConfig(budget=vp.Fixed(0.3)),
    "top-k": vp.PulseConfig(budget=vp.TopK(7)),
    "top-p": vp.PulseConfig(budget=vp.TopP(0.5)),
    "unfused": vp.PulseConfig(budget=Half(), anchor_output="dense"),
}


@pytest.mark.bits
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_one_graph_gives_the_eager_bits(problem, backend, config):
    torch._dynamo.reset()

    def run(q, kv, visual):
        return step(q, kv, visual, config, backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wanted = run(problem.q, problem.kv, problem.visual)
    for got, expected in zip(compiled(problem.q, problem.kv, problem.visual), wanted, strict=True):
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.bits
def test_a_cache_made_inside_the_graph_serves_three_prompts(backend):
    """With a capacity no shape depends on the prompt: one graph, compiled once."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(q, k, v, lengths, visual):
        return step(q, vp.KVCache(k, v, lengths), visual, vp.PulseConfig(), backend)

    compiled = torch.compile(run, fullgraph=True, backend=count)
    draws = Draws(0)
    k, v = draws.normal(1, 2, 64, 32), draws.normal(1, 2, 64, 32)
    for spans, length in (([(1, 9)], 30), ([(1, 9), (12, 40)], 50), ([], 64)):
        q = draws.normal(1, 4, 32)
        visual = vp.VisualTokens.from_spans([spans], capacity=40)
        lengths = torch.tensor([length], dtype=torch.int32)
        wanted = run(q, k, v, lengths, visual)
        got = compiled(q, k, v, lengths, visual)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len(graphs) == 1


@pytest.mark.bits
def test_a_given_output_is_filled_under_compile(backend):
    problem = CASES["grouped"].build(torch.float32)
    q, kv, visual = problem.q, problem.kv, problem.visual

    def run(q, out, scores):
        return vp.decode(q, kv, visual, out=out, scores=scores, backend=backend)[1].counts

    wanted_out, wanted_scores = torch.empty_like(q), torch.empty(kv.batch, kv.capacity)
    counts = run(q, wanted_out, wanted_scores)
    out, scores = torch.empty_like(q), torch.empty(kv.batch, kv.capacity)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, out, scores), counts)
    torch.testing.assert_close(out, wanted_out, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores, wanted_scores)


def test_eager_calls_do_not_pass_through_the_dispatcher(backend, monkeypatch):
    problem = CASES["grouped"].build(torch.float32)

    class Loud:
        def __getattr__(self, name):
            raise AssertionError(f"torch.ops.visionpulse.{name} was used in eager mode")

    monkeypatch.setattr(torch.ops, "visionpulse", Loud())
    step(problem.q, problem.kv, problem.visual, vp.PulseConfig(), backend)
