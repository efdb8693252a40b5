"""Torch's forms that we compare with compute what ours do."""

import torch

import visionpulse as vp
from visionpulse.bench import torch_forms
from visionpulse.testing import CASES, assert_output
from visionpulse.testing.compare import Exact


def problem_of(params_of):
    problem = CASES["grouped"].build(torch.float32)
    one = torch.tensor([0])
    kv = vp.KVCache(problem.kv.k[:1], problem.kv.v[:1])
    problem = problem._replace(q=problem.q[:1], kv=kv, visual=problem.visual.rows(one))
    return problem, Exact(problem.q, kv, problem.visual, params_of(problem))


def test_both_dense_forms_are_dense(params_of):
    problem, exact = problem_of(params_of)
    for form in (torch_forms.grouped, torch_forms.per_head):
        assert_output(form(problem.q, problem.kv), exact, None)


def test_the_method_in_torch_is_the_method(params_of):
    problem, exact = problem_of(params_of)
    q, kv, visual, config = problem.q, problem.kv, problem.visual, problem.config
    _, selection = vp.decode(q, kv, visual, config, backend="reference")
    count = int(selection.counts[0])
    is_visual = visual.mask(kv.capacity)
    candidates, text = (m.nonzero()[:, 1][None] for m in (is_visual, ~is_visual))
    out, positions, mass = torch_forms.anchor(q, kv, candidates, text, count, config)
    assert_output(out, exact, selection)
    torch.testing.assert_close(mass, selection.mass)
    wanted = exact.attended(selection)[0].nonzero()[:, 0]
    assert positions[0].tolist() == wanted.tolist()


def test_rows_are_gathered_each_by_its_own_positions():
    problem = CASES["grouped"].build(torch.float32)
    kept = torch.stack((torch.arange(10), torch.arange(10) * 3))
    both = torch_forms.gathered(problem.q, problem.kv, kept)
    for b in range(2):
        kv = vp.KVCache(problem.kv.k[b : b + 1], problem.kv.v[b : b + 1])
        alone = torch_forms.gathered(problem.q[b : b + 1], kv, kept[b : b + 1])
        torch.testing.assert_close(both[b : b + 1], alone)
