"""Several queries of a row on the simulated GPU: the problems of the job `queries`."""

from collections.abc import Callable
from typing import Any

import torch

import visionpulse as vp
from visionpulse import ops
from visionpulse.testing.cases import Case, Problem
from visionpulse.testing.compare import (
    Exact,
    assert_counts,
    assert_masses,
    assert_scores,
    assert_valid_selection,
)


def check_all(
    dtype: torch.dtype,
    build: Callable[[Case, torch.dtype], Problem],
    check_output: Callable[..., None],
    simulated: Any,
) -> None:
    """Each query is a step of its own; a pass over K and V serves up to 64 heads, or 32."""
    lengths, config = (700, 222), vp.PulseConfig(tau=0.3, ratio=(0.1, 0.1))
    spans = (((9, 300), (411, 693)), ((0, 217),))
    for count, group, head_dim, window in (
        (4, 4, 64, None), (8, 4, 128, None), (16, 4, 60, 333), (5, 7, 128, 5), (9, 8, 256, None),
    ):  # fmt: skip
        options = {} if window is None else {"window": window}
        case = Case(
            "", spans, 700, group, 1, head_dim, lengths=lengths, options=options, config=config,
            queries=count, q_counts=(count, 2),
        )  # fmt: skip
        problem = build(case, dtype)
        q, kv, visual, of = problem.q, problem.kv, problem.visual, problem.q_counts
        simulated.bytes_read()
        dense = vp.attend(q, kv, backend="cuda", q_counts=of, **options)
        a_pass = 64 if q.element_size() == 2 and head_dim <= 128 else 32
        keys = sum(
            min(n, n if window is None else window + real - 1)
            for n, real in zip(lengths, (count, 2), strict=True)
        )
        passes = -(-count * group // a_pass)
        wanted = passes * 2 * keys * head_dim * kv.k.element_size()
        assert int(simulated.bytes_read()) == wanted, case
        for score in ("prob", "logit"):
            scores = torch.full((*q.shape[:2], kv.capacity), torch.nan)
            out, chosen = vp.decode(
                q, kv, visual, config.updated(score=score), backend="cuda", scores=scores,
                q_counts=of, **options,
            )  # fmt: skip
            params = ops.numbers(q, None, None, window)
            params, _ = ops.budget(params, config.updated(score=score), visual, 2 * count, q.device)
            for i, (rows, one) in enumerate(problem.one_by_one()):
                exact, own = Exact.of(one, params), chosen.rows(rows)
                assert_masses(own.mass, own.mass_mean, exact)
                assert_scores(scores[:, i], exact)
                assert_counts(own, exact.n_visual, params)
                assert_valid_selection(own, scores[:, i], exact.candidate)
                check_output(out[:, i], exact, own)
                check_output(dense[:, i], exact, None)
