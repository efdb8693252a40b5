"""Run problems on the simulated GPU and hold the results against the contract.

A process of its own: `python tests/cusim/problems.py cases bfloat16`. Fails with the first problem
that the simulator refuses or whose result is wrong. With `--serve` it takes jobs, a line of JSON
each, and runs them in forks of itself: torch is loaded once. What is run: `cases` (the shared test
cases), `kernels` (each compiled kernel once), `probe` (few problems that every planted bug
disturbs), `choices` (selections among thousands of given scores), `garbage` (values that nobody can
check on a device), `traffic` (bytes that are read, and launches), `bulk` (how they are copied),
`devices` (two of them, and captures), `queries` (several of a row, with every kernel of them),
`groups` (rows of many splits, merged in two levels).
With a dtype such as `float8-float32` K and V are of 8 bits, beside q of the other one.
"""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import traceback
from typing import Any

import group_problems
import query_problems
import stand_in
import torch

import visionpulse as vp
from visionpulse import ops
from visionpulse.backends import cuda, get
from visionpulse.call import Call
from visionpulse.testing.cases import CASES, FLOAT8_CASES, Case, Problem, Scales
from visionpulse.testing.compare import (
    Exact,
    assert_counts,
    assert_masses,
    assert_output,
    assert_scores,
    assert_valid_selection,
)
from visionpulse.testing.draw import Draws

SPANS = ((4, 30), (37, 80))
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
simulated: Any  # the module that a job runs on
float8 = False  # K and V of a job have 8 bits
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
K_SCALES, V_SCALES = (0.5, 0.03), (3.0, 0.02)


def build(case: Case, dtype: torch.dtype) -> Problem:
    """The problem of a case, with K and V as the job wants them."""
    if float8 and case.scales is None:
        heads = case.kv_heads
        case = dataclasses.replace(case, scales=Scales(K_SCALES[:heads], V_SCALES[:heads]))
    return case.build(dtype)


def check_decode(problem: Problem, config: vp.PulseConfig) -> vp.Selection:
    """One anchor, with everything it gives."""
    q, kv, visual, options = problem.q, problem.kv, problem.visual, problem.case.options
    params = ops.numbers(q, *(options.get(name) for name in ("scale", "softcap", "window")))
    params, _ = ops.budget(params, config, visual, kv.batch, q.device)
    backend, exact = get("cuda"), Exact(q, kv, visual, params)
    buffer = torch.full((kv.batch, kv.capacity), torch.nan)
    results = []
    # without a buffer for scores the kernels take another way to the same selection
    for scores in (buffer, None):
        workspace = vp.Workspace()
        workspace.take("cuda", 1 << 22, torch.uint8, q.device).fill_(0 if scores is None else 255)
        out = torch.full_like(q, torch.nan)
        call = Call(q, kv, params, visual, out=out, scores=scores, workspace=workspace)
        _, chosen = backend.decode(call)
        results.append((out, chosen.indices, chosen.counts, chosen.mass, chosen.mass_mean))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(9), b.nan_to_num(9)), "two runs gave two results"
    assert_masses(chosen.mass, chosen.mass_mean, exact)
    assert_scores(buffer, exact)
    assert_counts(chosen, exact.n_visual, params)
    assert_valid_selection(chosen, buffer, exact.candidate)
    check_output(out, exact, chosen if config.anchor_output == "pruned" else None)
    return chosen


def check_output(out: torch.Tensor, exact: Exact, selection: vp.Selection | None) -> None:
    """Compare with the contract; the kernels of 16-bit types round their weights."""
    rounds_weights = get("cuda").rounds_weights(out.dtype)
    assert_output(out, exact, selection, rounds_weights=rounds_weights)


def check_attend(problem: Problem, selection: vp.Selection) -> None:
    """Dense decode and a follower."""
    q, kv, visual, options = problem.q, problem.kv, problem.visual, problem.case.options
    params = ops.numbers(q, *(options.get(name) for name in ("scale", "softcap", "window")))
    exact = Exact(q, kv, visual, params)
    check_output(vp.attend(q, kv, backend="cuda", **options), exact, None)
    out = vp.attend(q, kv, visual, selection, backend="cuda", **options)
    check_output(out, exact, selection)


def check_whole(problem: Problem, anchor_output: str) -> None:
    """All the ops on one problem."""
    config = problem.config.updated(anchor_output=anchor_output)
    check_attend(problem, check_decode(problem, config))


def check(case: Case, dtype: torch.dtype, anchor_output: str) -> None:
    """The same of a case."""
    check_whole(build(case, dtype), anchor_output)


def cases(dtype: torch.dtype) -> None:
    """Every shared case; the output of the anchor alternates."""
    for i, case in enumerate((FLOAT8_CASES if float8 else CASES).values()):
        check(case, dtype, ("pruned", "dense")[i % 2])


def kernels(dtype: torch.dtype) -> None:
    """Every kernel of a dtype: all head dims, and a group for each row tile and team of warps."""
    for i, head_dim in enumerate(HEAD_DIMS):
        for group in (4, 12, 24):
            case = Case("", (SPANS,), heads=group, kv_heads=1, head_dim=head_dim)
            check(case, dtype, ("pruned", "dense")[i % 2])


def probe(dtype: torch.dtype) -> None:
    """Long enough for splits and refilled stages; head dims that a kernel has, and has not."""
    spans = (((9, 700), (731, 880)), ((0, 300),))
    config = vp.PulseConfig(tau=0.3, ratio=(0.1, 0.1))
    for group, head_dim in ((4, 64), (7, 60), (24, 64)):
        case = Case("", spans, 1100, group, 1, head_dim, lengths=(1100, 611), config=config)
        for anchor_output in ("pruned", "dense"):
            check(case, dtype, anchor_output)
    logit = config.updated(score="logit")
    check(Case("", spans, 900, 4, 1, 60, values="ties", config=logit), dtype, "pruned")
    if float8:
        nan = Case("", (SPANS,), heads=8, kv_heads=2, head_dim=64, values="nan_visual")
        check(nan, dtype, "pruned")
        far_from_one(dtype)


def far_from_one(dtype: torch.dtype) -> None:
    """Queries of 8-bit keys that no float16 holds; the scale of the logits makes up for them."""
    for power in (2.0**20, 2.0**-30) if dtype != torch.float16 else ():
        options = {"scale": 0.125 / power}
        case = Case("", (SPANS,), heads=8, kv_heads=2, head_dim=64, options=options)
        problem = build(case, dtype)
        problem = problem._replace(q=problem.q * power)
        check_attend(problem, check_decode(problem, problem.config))


SIZE = 6100  # the last steps of a warp are full in one row, and part of one in the others


def choices(dtype: torch.dtype) -> None:
    """More candidates than one block reads at once: every way a radix select can go."""
    draws = Draws(3)
    # one step of a warp begins in the first span, and its later candidates lie in the next
    spans = (((3, 2940), (2990, 6050)), ((0, SIZE),), ((7, 8), (100, 4300)))
    visual = vp.VisualTokens.from_spans(spans)
    lengths = torch.tensor([SIZE, SIZE, 4000], dtype=torch.int32)
    starts = torch.tensor([0, 17, 120], dtype=torch.int32)
    normal = draws.normal(3, SIZE)
    rare = draws.uniform(3, SIZE) < 0.02
    values = {
        "normal": normal,
        "probabilities": torch.ldexp(draws.uniform(3, SIZE), draws.integers(-30, 0, 3, SIZE)),
        "few": (normal * 2).round(),
        "equal": torch.zeros(3, SIZE),
        "neighbours": torch.ones(3, SIZE).view(torch.int32).add(rare).view(torch.float32),
        "nan": normal.masked_fill(~rare, torch.nan),
        "minus infinity": normal.masked_fill(~rare, -torch.inf),
    }
    for name, scores in values.items():
        for ratio in (0.0, 0.013, 0.3, 1.0):
            mass = torch.tensor([ratio, ratio / 2, torch.nan])
            config = vp.PulseConfig(ratio=(0.0, max(ratio, 0.1)))
            given = (scores, mass, visual, config)
            options = {"starts": starts, "lengths": lengths}
            ours = vp.select(*given, **options, backend="cuda")
            right = vp.select(*given, **options, backend="reference")
            assert torch.equal(ours.counts, right.counts)
            assert torch.equal(ours.indices, right.indices)
            if name == "normal":  # as many in one bin as are kept: no more bits are looked at
                kept = torch.where(right.indices < 0, SIZE, right.indices).long()
                apart = torch.zeros(3, SIZE + 1).scatter_(1, kept, 2.0)[:, :SIZE].contiguous()
                again = vp.select(apart, *given[1:], **options, backend="cuda")
                assert torch.equal(again.indices, right.indices)


def garbage(dtype: torch.dtype) -> None:
    """Values that nobody checks on a device: pages and positions that are not there."""
    problem = build(CASES["paged-hnd"], dtype)
    q, kv, visual = problem.q, problem.kv, problem.visual
    table = kv.block_table.clone()
    table[0, 1], table[0, 3], table[1, 3] = 10**6, -5, 2**31 - 1
    lengths = torch.tensor([10**6, 77], dtype=torch.int32)
    starts = torch.tensor([-3, 33], dtype=torch.int32)
    # pages beyond the pool; behind the row nothing is known, so its length ends at the capacity
    table = table.masked_fill(table == -1, 10**6)
    kv = dataclasses.replace(kv, block_table=table, lengths=lengths, starts=starts)
    params = ops.numbers(q)
    indices = torch.tensor([[-9, 5, 20, 50, 10**6], [34, 40, 69, 95, 96]], dtype=torch.int32)
    counts = torch.tensor([99, 4], dtype=torch.int32)
    mass = torch.zeros(2)
    chosen = vp.Selection(indices, counts, mass, mass)
    backend, exact = get("cuda"), Exact(q, kv, visual, params)
    for selection in (None, chosen):
        out = torch.full_like(q, torch.nan)
        seen = visual if selection else None
        backend.attend(Call(q, kv, params, seen, selection, out, workspace=vp.Workspace()))
        check_output(out, exact, selection)
    # a visual position without a page is no candidate, counts in no N_v, and is never kept
    holes = problem._replace(kv=kv)
    assert (exact.n_visual < Exact(*problem[1:4], params).n_visual).all()
    for score in ("prob", "logit", "prob_tau"):
        for anchor_output in ("pruned", "dense"):
            for ratio in ((0.05, 0.3), (1.0, 1.0)):
                check_decode(
                    holes, vp.PulseConfig(score=score, anchor_output=anchor_output, ratio=ratio)
                )
    kv = dataclasses.replace(kv, block_table=table.fill_(-1))
    check_decode(problem._replace(kv=kv), problem.config)
    # more candidates than one block reads at once
    case = Case("", (((3, 2390),),), 2400, 4, 1, 64, layout="NHD", page=7)
    problem = build(case, dtype)
    problem.kv.block_table[0, ::5] = -1
    for score in ("prob", "logit"):
        check_decode(problem, vp.PulseConfig(score=score, ratio=(0.05, 0.3)))


def traffic(dtype: torch.dtype) -> None:
    """Each key and value that counts is read once, by all query heads of its KV head together."""
    config = vp.PulseConfig(tau=0.3, ratio=(0.1, 0.1))
    problem = build(Case("", (((9, 700),),), 900, 16, 2, 64, config=config), dtype)
    q, kv, visual = problem.q, problem.kv, problem.visual
    row = kv.kv_heads * kv.head_dim * kv.k.element_size()  # bytes of one token's keys
    text, heads = 900 - 691, 16

    def read() -> int:
        return int(simulated.bytes_read())

    read()
    vp.attend(q, kv, backend="cuda")
    assert read() == 2 * 900 * row
    _, chosen = vp.decode(q, kv, visual, config, backend="cuda")
    kept = int(chosen.counts)
    assert kept == 69
    # K of every key once, then V and the stored logits of what is attended to
    assert read() == 900 * row + (text + kept) * (row + 4 * heads)
    vp.attend(q, kv, visual, chosen, backend="cuda")
    assert read() == 2 * (text + kept) * row
    vp.decode(q, kv, visual, config.updated(anchor_output="dense"), backend="cuda")
    assert read() == 2 * 900 * row
    # 32 query heads of one KV head share one read as well
    wide = build(Case("", (((9, 700),),), 900, 32, 1, 64), dtype)
    vp.attend(wide.q, wide.kv, backend="cuda")
    assert read() == 2 * 900 * row // 2

    def launches(score: str, anchor_output: str) -> int:
        simulated.launches()
        vp.decode(q, kv, visual, config.updated(score=score, anchor_output=anchor_output),
                  backend="cuda")  # fmt: skip
        return int(simulated.launches())

    simulated.ranges()
    launches("prob", "pruned")
    stages = ["score", "score", "select", "attend"]
    assert simulated.ranges() == [f"visionpulse::{stage}" for stage in stages]
    assert launches("prob", "pruned") == 4 and launches("prob", "dense") == 3
    assert launches("logit", "pruned") == 3 and launches("logit", "dense") == 2
    vp.attend(q, kv, visual, chosen, backend="cuda")
    vp.attend(q, kv, backend="cuda")
    assert simulated.launches() == 2


def bulk(dtype: torch.dtype) -> None:
    """Whole tiles of float32 come by the copy engine, and change neither what is read nor given."""
    config = vp.PulseConfig(tau=0.3, ratio=(0.1, 0.1))
    token = 64 * torch.empty((), dtype=dtype).element_size()

    def run(case: Case, copies: str) -> tuple[tuple[torch.Tensor, ...], list[int], list[int]]:
        """What comes out; bytes read by dense, anchor and follower; those by the copy engine."""
        q, kv, visual = (problem := case.build(dtype)).q, problem.kv, problem.visual
        cuda.use_copies(copies)
        read, engine = [], []

        def count() -> None:
            read.append(int(simulated.bytes_read()))
            engine.append(int(simulated.bulk_bytes()))

        count()
        dense = vp.attend(q, kv, backend="cuda")
        count()
        pruned, chosen = vp.decode(q, kv, visual, config, backend="cuda")
        count()
        follower = vp.attend(q, kv, visual, chosen, backend="cuda")
        count()
        return (dense, pruned, chosen.indices, follower), read[1:], engine[1:]

    # tokens, of K and V of all; of K of all; of K and V of the text behind the visual tokens
    shares = (2 * 900, 900, 2 * 200)
    for layout, page in (("plain", 16), ("HND", 64), ("token_major", 16)):
        case = Case("", (((9, 700),),), 900, 4 * 2, 2, 64, layout=layout, page=page)
        ours, read, engine = run(case, "bulk")
        theirs, same, none = run(case, "async")
        assert read == same and none == [0, 0, 0]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        beside = layout != "token_major"
        least = [beside * 0.7 * 2 * tokens * token for tokens in shares]
        assert all(a >= b for a, b in zip(engine, least, strict=True)), (engine, least)
        assert beside or engine == [0, 0, 0]
        assert run(case, "auto")[2] == engine


def devices(dtype: torch.dtype) -> None:
    """Two devices with streams of their own, and kernels whose first use lies in a capture."""
    problem = build(Case("", (SPANS,), heads=8, kv_heads=2, head_dim=64), dtype)

    def on(device: int) -> None:
        stream = device << 32 | 7
        cuda._place = lambda like, visual: (device, stream, visual.max_count if visual else 0, 0)

    on(1)
    assert get("cuda").unavailable() is None
    simulated.capture(1)  # the very first use
    check_attend(problem, check_decode(problem, problem.config))
    simulated.capture(0)
    assert simulated.current_device() == 0, "an op left another device behind"
    on(0)
    vp.attend(problem.q, problem.kv, backend="cuda")  # a dense layer has loaded all that follows
    simulated.capture(2)
    for output in ("pruned", "dense"):
        config = problem.config.updated(anchor_output=output)
        check_attend(problem, check_decode(problem, config))
    simulated.capture(0)


def solve(what: str, dtype: str) -> None:
    """All problems of one kind."""
    global simulated, float8
    simulated = stand_in.plug_in()
    float8 = dtype.startswith("float8")
    query = dtype.removeprefix("float8").removeprefix("-") or "bfloat16"
    if what == "groups":
        return group_problems.check_all(DTYPES[query], build, check_whole, check_output, simulated)
    modes = (cases, kernels, probe, choices, garbage, traffic, bulk, devices)
    if what == "queries":
        return query_problems.check_all(DTYPES[query], build, check_output, simulated)
    {mode.__name__: mode for mode in modes}[what](DTYPES[query])


def serve() -> None:
    """Answer each job, [environment, what, dtype], with its exit code and what it said."""
    for line in sys.stdin:
        environment, what, dtype = json.loads(line)
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                os.environ.update(environment)
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(said.fileno(), stream.fileno())
                signal.alarm(600)  # one that hangs is killed
                try:
                    solve(what, dtype)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            print(json.dumps([code, said.read().decode(errors="replace")[-3000:]]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        solve(*sys.argv[1:])
