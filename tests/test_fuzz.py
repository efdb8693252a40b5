"""Every backend on problems nobody wrote down: shapes, cuts, layouts and options at random."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import visionpulse as vp
from visionpulse.testing import Case, Scales


@st.composite
def spans(draw, size):
    """Disjoint runs inside 0..size, from none to one per second token."""
    if draw(st.booleans()):
        cuts = sorted(draw(st.sets(st.integers(0, size), max_size=12)))
        return tuple(zip(cuts[::2], cuts[1::2], strict=False))
    step = draw(st.integers(2, 9))
    return tuple((i, i + 1) for i in range(draw(st.integers(0, 3)), size, step))


def scales_of(count):
    return st.tuples(*[st.sampled_from([1e-4, 1 / 64, 0.013, 0.7])] * count)


@st.composite
def cases(draw, float8=False):
    """A valid case of any kind the contract knows."""
    rows = draw(st.integers(1, 3))
    size = draw(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 130, 257, 700]))
    kv_heads = draw(st.integers(1, 3))
    layout = draw(st.sampled_from(["plain", "token_major", "unaligned", "NHD", "HND"]))

    def per_row():
        return tuple(draw(st.integers(0, size)) for _ in range(rows))

    options = {}
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 30.0]))
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, size + 3))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.01, 1.0]))
    kinds, scales = ["normal", "normal", "ties", "equal", "minus_zero", "huge"], None
    if float8:
        one_or_each = st.one_of(st.just(()), *(scales_of(n) for n in (1, kv_heads)))
        kinds, scales = (
            [*kinds, "finite", "subnormal"],
            Scales(draw(one_or_each), draw(one_or_each)),
        )
    queries = draw(st.sampled_from([None, None, 1, 2, 3, 6]))
    q_counts = None
    if queries and draw(st.booleans()):
        q_counts = tuple(draw(st.integers(0, queries)) for _ in range(rows))
    return Case(
        "fuzz",
        tuple(draw(spans(size)) for _ in range(rows)),
        size=size,
        queries=queries,
        q_counts=q_counts,
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 24, 64, 72, 80, 96, 128, 136, 192, 256])),
        lengths=draw(st.sampled_from([None, per_row()])),
        starts=draw(st.sampled_from([None, per_row()])),
        values=draw(st.sampled_from(kinds)),
        scales=scales,
        layout=layout,
        page=draw(st.sampled_from([1, 3, 16, 64])),
        options=options,
        config=vp.PulseConfig(
            tau=draw(st.sampled_from([0.05, 0.4, 1.0, 3.0])),
            ratio=draw(st.sampled_from([(0.0, 0.0), (0.01, 0.05), (0.1, 0.9), (1.0, 1.0)])),
            mass=draw(st.sampled_from(["max", "mean"])),
            score=draw(st.sampled_from(["prob", "logit", "prob_tau"])),
            anchor_output=draw(st.sampled_from(["pruned", "dense"])),
        ),
    )


by_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


@by_dtype
def test_random_problems(backend, device, check_decode, dtype, pytestconfig):
    solve(cases(), backend, device, check_decode, dtype, pytestconfig)


@pytest.mark.float8
@by_dtype
def test_random_problems_in_8_bits(backend, device, check_decode, dtype, pytestconfig):
    solve(cases(float8=True), backend, device, check_decode, dtype, pytestconfig)


def solve(drawn, backend, device, check_decode, dtype, pytestconfig):
    @settings(
        max_examples=pytestconfig.getoption("--examples"),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=drawn, seed=st.integers(0, 2**20))
    def run(case, seed):
        problem = case.build(dtype, device, seed)
        _, selection, _ = check_decode(problem, backend)
        follow = vp.attend(
            problem.q, problem.kv, problem.visual, selection, q_counts=problem.q_counts,
            backend=backend, **case.options,
        )  # fmt: skip
        assert follow.shape == problem.q.shape

    run()
