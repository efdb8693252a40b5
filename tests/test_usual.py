"""The look that passes a usual call: it passes nothing that the checks would refuse."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

import visionpulse as vp
from visionpulse import checks, ops, usual

B, H, G, N, D = 2, 8, 2, 24, 16


def cache(rows=B, heads=G, dim=D, dtype=torch.float32, **changes) -> vp.KVCache:
    made = torch.randn(2, rows, heads, N, dim).to(dtype)
    return vp.KVCache(made[0], made[1], **changes)


def query(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (B, H, D))


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def visual(rows=B, end=20) -> vp.VisualTokens:
    return vp.VisualTokens.from_spans([[(2, end)]] * rows)


def chosen(rows=B, k_max=3, **changes) -> vp.Selection:
    made = vp.Selection.empty(rows, k_max)
    return replace(made, **changes) if changes else made


QUERIES: list[Callable[[], object]] = [
    query,
    lambda: query(B, 1, H, D),
    lambda: query(B, 2, H, D),
    lambda: query(1, H, D),
    lambda: query(B, H, D // 2),
    lambda: query(B, H + 1, D),
    lambda: query(B, 0, D),
    lambda: query(B, 33 * G, D),
    lambda: query().double(),
    lambda: query().bfloat16(),
    lambda: query().requires_grad_(),
    lambda: query().to("meta"),
    lambda: query(B, D, H).transpose(1, 2),
    lambda: freed(query()),
    lambda: torch.nn.Parameter(query(), requires_grad=False),
    lambda: [1.0],
]
CACHES: list[Callable[[], object]] = [
    cache,
    lambda: cache(heads=3),
    lambda: cache(dtype=torch.bfloat16),
    lambda: cache(dtype=torch.float64),
    lambda: cache(dtype=torch.float8_e4m3fn),
    lambda: cache(lengths=torch.tensor([N, N + 1], dtype=torch.int32)),
    lambda: cache(starts=torch.tensor([0, -1], dtype=torch.int32)),
    lambda: vp.KVCache(freed(torch.randn(B, G, N, D)), torch.randn(B, G, N, D)),
    lambda: vp.KVCache(torch.randn(B, G, N, D), torch.randn(B, G, N, D, requires_grad=True)),
    lambda: None,
]
SETS: list[Callable[[], object]] = [
    lambda: None,
    visual,
    lambda: visual(rows=1),
    lambda: visual(end=N + 1),
    lambda: visual().to("meta"),
    lambda: replace(visual(), counts=freed(torch.ones(64, dtype=torch.int32))),
    lambda: replace(visual(), is_borrowed=True, counts=torch.tensor([3, 3], dtype=torch.int32)),
    lambda: "tokens",
]
SELECTIONS: list[Callable[[], object]] = [
    chosen,
    lambda: chosen(rows=1),
    lambda: chosen(k_max=0),
    lambda: chosen(indices=torch.zeros(B, 3)),
    lambda: chosen(indices=torch.zeros(B, 6, dtype=torch.int32)[:, ::2]),
    lambda: chosen(indices=torch.zeros(B, dtype=torch.int32)),
    lambda: chosen(indices=freed(torch.zeros(B, 64, dtype=torch.int32))),
    lambda: chosen(counts=torch.zeros(1, dtype=torch.int32)),
    lambda: chosen(counts=torch.full((B,), 9, dtype=torch.int32), trusted=False),
    lambda: chosen().to("meta"),
    lambda: None,
]
SCORES: list[Callable[[], object]] = [
    lambda: torch.randn(B, N),
    lambda: torch.randn(B, 2, N),
    lambda: torch.randn(1, N),
    lambda: torch.randn(N, B).t(),
    lambda: torch.randn(B, N).double(),
    lambda: torch.randn(B, N).bfloat16(),
    lambda: torch.randn(B, N).to("meta"),
    lambda: freed(torch.randn(B, N)),
]
MASSES: list[Callable[[], object]] = [
    lambda: torch.rand(B),
    lambda: torch.rand(1),
    lambda: torch.rand(B, 2),
    lambda: torch.rand(B).half(),
    lambda: freed(torch.rand(B)),
    lambda: None,
]


def refused(check: Callable[[], object]) -> bool:
    try:
        check()
    except (TypeError, ValueError):
        return True
    return False


def test_what_is_passed_as_usual_is_not_refused(monkeypatch):
    seen = {True: 0, False: 0}
    for made in product(QUERIES, CACHES, SETS):
        q, kv, tokens = (make() for make in made)
        passed = usual.attention(q, kv, tokens)
        with monkeypatch.context() as patch:
            patch.setattr(usual, "attention", lambda *call: False)
            wrong = refused(lambda: ops.check(q, kv, tokens))  # noqa: B023
        assert not (passed and wrong), (q, kv, tokens)
        seen[wrong] += 1
    assert min(seen.values()) > 10


def test_a_selection_that_is_passed_as_usual_is_not_refused():
    for make in SELECTIONS:
        given = make()
        wrong = refused(lambda: checks.selection(given, B, N, torch.device("cpu")))  # noqa: B023
        assert usual.selection(given, B, torch.device("cpu")) is (not wrong), given


def test_scores_that_are_passed_as_usual_are_not_refused():
    for made in product(SCORES, MASSES, MASSES, SETS):
        scores, mass, mean, tokens = (make() for make in made)

        def check(scores=scores, mass=mass, mean=mean, tokens=tokens):
            checks.ranked(scores, mass, mean)
            checks.visual_set(tokens, scores.shape[0], scores.shape[-1], scores.device)
            checks.visual_tables(tokens)

        assert not (usual.ranked(scores, mass, mean, tokens) and refused(check)), made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_decode_step_is_usual(dtype):
    q, kv, tokens = query().to(dtype), cache(dtype=dtype), visual()
    assert usual.attention(q, kv, None)
    assert usual.attention(q, kv, tokens)
    assert usual.attention(query(B, 2 * H, D)[:, ::2].to(dtype), kv, tokens)  # heads of a wider one
    _, selection = vp.decode(q, kv, tokens)
    assert usual.selection(selection, B, q.device)
    assert usual.ranked(*vp.score(q, kv, tokens), tokens)
