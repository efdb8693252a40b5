"""Rows of so many splits that groups of them are merged first: the problems of the job `groups`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import visionpulse as vp
from visionpulse import ops
from visionpulse.testing.cases import Case, Problem
from visionpulse.testing.compare import Exact

LENGTHS = (3200, 3000, 1100)  # the last row is merged at once
CHIP = (90, 132, 232448)
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as args.h numbers them


def check_all(
    dtype: torch.dtype,
    build: Callable[[Case, torch.dtype], Problem],
    check: Callable[[Problem, str], None],
    check_output: Callable[..., None],
    simulated: Any,
) -> None:
    """The contract, and bits that no neighbour and no order of arrival moves."""
    simulated.plug_in(*CHIP)
    config = vp.PulseConfig(tau=0.3, ratio=(0.05, 0.1))
    spans = (((9, 2900),), ((0, 1500), (1600, 2900)), ((100, 900),))
    for group, kv_heads, dim in ((32, 1, 64), (24, 1, 60)):
        shape = (KINDS[dtype], 3, group * kv_heads, kv_heads, dim, 3200)
        plan = simulated.plan(False, CHIP, shape, True, True)
        at_once = plan["merge"][0]
        splits = [simulated.splits(plan["rule"], n, kv_heads) for n in LENGTHS]
        assert splits[-1] <= at_once < min(splits[:2]), (splits, plan)
        case = Case("", spans, 3200, group, kv_heads, dim, lengths=LENGTHS, config=config)
        problem = build(case, dtype)
        q, kv = problem.q, problem.kv
        check(problem, "dense")
        together = vp.attend(q, kv, backend="cuda")
        for seed in (2, 3, 4):
            simulated.configure(seed, seed % 2 == 0)
            assert torch.equal(vp.attend(q, kv, backend="cuda"), together), "an order shows"
        for row in range(len(LENGTHS)):
            one = slice(row, row + 1)
            alone = replace(kv, k=kv.k[one], v=kv.v[one], lengths=kv.lengths[one])
            assert torch.equal(vp.attend(q[one], alone, backend="cuda"), together[one]), row
    case = Case("", spans, 3200, 16, 1, 64, lengths=LENGTHS, config=config, queries=4)
    problem = build(case, dtype)
    out = vp.attend(problem.q, problem.kv, backend="cuda")
    params = ops.numbers(problem.q, None, None, None)
    for i, (_, one) in enumerate(problem.one_by_one()):
        check_output(out[:, i], Exact.of(one, params), None)
