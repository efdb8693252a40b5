"""A cache of 8-bit floats: storing, records, and every backend that reads it, case by case."""

import dataclasses

import pytest
import torch

import visionpulse as vp
from visionpulse.backends import get
from visionpulse.call import Call
from visionpulse.float8 import FLOAT8, LARGEST, read, stored
from visionpulse.testing import (
    CASES,
    FLOAT8_CASES,
    FLOAT8_QUERY_CASES,
    Case,
    Scales,
    assert_clear_error,
    assert_masses,
    assert_output,
    assert_scores,
)
from visionpulse.testing.compare import Exact
from visionpulse.testing.draw import Draws
from visionpulse.torch_ops import arguments, fields_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TWO_SPANS = ((4, 30), (37, 80))
PER_HEAD = Scales((0.01, 0.5), (2.0, 0.02))

by_case = pytest.mark.parametrize("case", FLOAT8_CASES.values(), ids=FLOAT8_CASES.keys())
by_queries = pytest.mark.parametrize(
    "case", FLOAT8_QUERY_CASES.values(), ids=FLOAT8_QUERY_CASES.keys()
)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# without test_schema: torch cannot compare tensors of float8_e4m3fn, so the next test does
OPCHECKS = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


def every_code():
    """The 256 numbers of the format, NaN at 127 and 255."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FLOAT8)


@pytest.mark.float8
@by_case
@by_dtype
def test_decode_is_the_contract(backend, device, case, dtype, check_decode):
    check_decode(case.build(dtype, device), backend)


@pytest.mark.float8
@by_queries
def test_several_queries_are_the_contract(backend, device, case, check_decode):
    check_decode(case.build(torch.bfloat16, device), backend)


@pytest.mark.float8
@by_case
def test_a_dense_anchor_gives_the_dense_output(backend, device, case, check_decode):
    config = case.config.updated(anchor_output="dense")
    check_decode(case.build(torch.bfloat16, device), backend, config)


@pytest.mark.float8
@by_case
@by_dtype
def test_followers_and_dense_layers_are_the_contract(
    backend, device, case, dtype, params_of, check_output
):
    problem = case.build(dtype, device)
    q, kv, visual, config = problem.q, problem.kv, problem.visual, problem.config
    exact = Exact.of(problem, params_of(problem))
    scores, mass, mass_mean = vp.score(q, kv, visual, config, backend=backend, **case.options)
    assert_scores(scores, exact)
    assert_masses(mass, mass_mean, exact)
    _, selection = vp.decode(q, kv, visual, config, backend=backend, **case.options)
    out = vp.attend(q, kv, visual, selection, backend=backend, **case.options)
    check_output(out, exact, selection, backend)
    check_output(vp.attend(q, kv, backend=backend, **case.options), exact, None, backend)


@pytest.mark.float8
@pytest.mark.parametrize("group", (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32))
def test_any_group_size(backend, device, group, check_decode):
    case = Case("", (TWO_SPANS,), heads=2 * group, kv_heads=2, scales=PER_HEAD)
    check_decode(case.build(torch.bfloat16, device), backend)


@pytest.mark.float8
@pytest.mark.parametrize("head_dim", (16, 40, 64, 72, 80, 96, 128, 192, 256))
@by_dtype
def test_any_head_dim(backend, device, head_dim, dtype, check_decode):
    case = Case("", (TWO_SPANS,), heads=8, head_dim=head_dim, layout="unaligned", scales=PER_HEAD)
    check_decode(case.build(dtype, device), backend)


@pytest.mark.float8
@pytest.mark.parametrize("score", ("prob", "logit", "prob_tau"))
@pytest.mark.parametrize("mass", ("max", "mean"))
@pytest.mark.parametrize("anchor_output", ("pruned", "dense"))
def test_options_combine(backend, device, score, mass, anchor_output, check_decode):
    config = vp.PulseConfig(
        tau=0.3, ratio=(0.02, 0.6), score=score, mass=mass, anchor_output=anchor_output
    )
    case = dataclasses.replace(FLOAT8_CASES["paged-hnd"], scales=PER_HEAD)
    check_decode(case.build(torch.bfloat16, device), backend, config)


@pytest.mark.float8
@by_dtype
def test_every_code_is_read_as_its_number(backend, device, dtype):
    """One visible key, so the output is its value: each of the 256 numbers, at each place."""
    codes = torch.stack([every_code().view(torch.uint8).roll(i) for i in range(5)])  # [5, 256]
    v = codes[:, None, None].view(FLOAT8).to(device)  # [B=5, G=1, N=1, D=256]
    k = stored(torch.zeros(v.shape)).to(device)
    q = torch.ones(5, 2, 256, dtype=dtype, device=device)
    wanted = v[:, :, 0].to(dtype).expand(-1, 2, -1)
    out = vp.attend(q, vp.KVCache(k, v), backend=backend)
    # the weight of the one key may be off by a rounding of float32
    torch.testing.assert_close(out, wanted, rtol=3e-7, atol=0.0, equal_nan=True)
    # the same numbers as a key, by the logits they make: a number at a place, zeros at the others
    k = torch.zeros(1, 1, 256, 64, dtype=torch.uint8, device=device)
    n = torch.arange(256, device=device)
    k[0, 0, n, n % 64] = n.to(torch.uint8)
    visual = vp.VisualTokens.from_spans([[(0, 256)]], device=device)
    q, kv = torch.ones(1, 1, 64, dtype=dtype, device=device), vp.KVCache(*[k.view(FLOAT8)] * 2)
    config = vp.PulseConfig(score="logit")
    scores, *_ = vp.score(q, kv, visual, config, scale=1.0, backend=backend)
    numbers = every_code().float().to(device)
    torch.testing.assert_close(scores[0], numbers, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.float8
@pytest.mark.bits
@pytest.mark.parametrize("name", ("grouped", "ragged", "paged-nhd", "long", "ties"))
@by_dtype
def test_one_number_has_the_bits_of_one_for_each_head(backend, device, name, dtype):
    case = dataclasses.replace(FLOAT8_CASES[name], scales=Scales((0.02,), (0.3,)))
    problem = case.build(dtype, device)
    kv = problem.kv
    each = {"k_scale": torch.full((2,), 0.02), "v_scale": torch.full((2,), 0.3)}
    none = {"k_scale": kv.k_scale[0], "v_scale": kv.v_scale[0]}  # no axis at all
    wanted = everything(problem, kv, backend)
    for scales in (each, none):
        scales = {name: scale.to(device) for name, scale in scales.items()}
        got = everything(problem, dataclasses.replace(kv, **scales), backend)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(everything(problem, kv, backend), wanted, strict=True)
    )


def everything(problem, kv, backend):
    q, visual, config = problem.q, problem.visual, problem.config
    scores = torch.empty(kv.batch, kv.capacity, device=q.device)
    out, selection = vp.decode(q, kv, visual, config, scores=scores, backend=backend)
    follow = vp.attend(q, kv, visual, selection, backend=backend)
    dense = vp.attend(q, kv, backend=backend)
    lists = (selection.indices, selection.counts, selection.mass, selection.mass_mean)
    return out, follow, dense, scores, *lists


@pytest.mark.float8
@pytest.mark.bits
@pytest.mark.parametrize("layout", ("NHD", "HND"))
@pytest.mark.parametrize("page", (1, 5, 16))
def test_pages_do_not_change_the_bits(backend, device, layout, page):
    plain = dataclasses.replace(FLOAT8_CASES["ragged"], scales=PER_HEAD)
    paged = dataclasses.replace(plain, layout=layout, page=page)
    results = []
    for case in (dataclasses.replace(plain, layout="unaligned"), paged):
        problem = case.build(torch.bfloat16, device)
        results.append(everything(problem, problem.kv, backend))
    for name, a, b in zip(range(8), *results, strict=True):
        width = min(a.shape[-1], b.shape[-1])  # whole pages: the capacity is rounded up
        assert torch.equal(a[..., :width], b[..., :width]), name


@pytest.mark.float8
@pytest.mark.bits
@pytest.mark.parametrize("name", ("ragged", "left-padding", "long", "softcap"))
def test_a_row_does_not_depend_on_its_neighbours(backend, device, name):
    problem = FLOAT8_CASES[name].build(torch.bfloat16, device)
    kv, case = problem.kv, problem.case
    out = vp.attend(problem.q, kv, backend=backend, **case.options)
    for b in range(case.rows):
        cut = [None if t is None else t[b : b + 1] for t in (kv.lengths, kv.starts)]
        alone = vp.KVCache(kv.k[b : b + 1], kv.v[b : b + 1], *cut, kv.k_scale, kv.v_scale)
        got = vp.attend(problem.q[b : b + 1], alone, backend=backend, **case.options)
        assert torch.equal(got[0], out[b])


@pytest.mark.float8
@pytest.mark.parametrize("name", ("grouped", "paged-hnd"))
def test_opcheck(backend, name):
    problem = FLOAT8_CASES[name].build(torch.bfloat16)
    call = Call(problem.q, problem.kv, vp.ops.numbers(problem.q), problem.visual)
    params = call.params._replace(tau=0.4, r_min=0.05, r_max=0.5, k_max=43)
    for op, given in (
        ("decode", call._replace(params=params)),
        ("score", call._replace(params=params._replace(anchor_output="dense"))),
        ("attend_dense", call._replace(visual=None)),
    ):
        operator = getattr(torch.ops.visionpulse, op)
        given = arguments(op, fields_of(given), backend)
        torch.library.opcheck(operator, given, test_utils=OPCHECKS)


@pytest.mark.float8
def test_inputs_are_left_alone(backend, device, check_decode):
    problem = FLOAT8_CASES["paged-hnd"].build(torch.float32, device)
    kv = problem.kv
    tensors = (kv.k_pages.view(torch.uint8), kv.v_pages.view(torch.uint8), kv.k_scale, kv.v_scale)
    before = [t.clone() for t in tensors]
    check_decode(problem, backend)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@pytest.mark.float8
def test_a_graph_gives_the_eager_numbers(backend):
    torch._dynamo.reset()
    problem = dataclasses.replace(FLOAT8_CASES["grouped"], scales=PER_HEAD).build(torch.float32)

    def run(q, k, v, k_scale, v_scale, visual):
        kv = vp.KVCache(k, v, k_scale=k_scale, v_scale=v_scale)
        out, selection = vp.decode(q, kv, visual, backend=backend)
        return out, selection.indices, vp.attend(q, kv, backend=backend)

    kv = problem.kv
    given = (problem.q, kv.k, kv.v, kv.k_scale, kv.v_scale, problem.visual)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(*given), run(*given), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_backend_that_cannot_read_it_says_so(monkeypatch):
    problem = FLOAT8_CASES["grouped"].build(torch.bfloat16)
    monkeypatch.setattr(type(get("cpu")), "reads_float8", False)
    with pytest.raises(vp.BackendUnavailableError, match="float8_e4m3fn"):
        vp.attend(problem.q, problem.kv, backend="cpu")
    assert "float8_e4m3fn" in str(vp.explain(problem.q, problem.kv, backend="cpu"))
    assert vp.explain(problem.q, problem.kv).name == "reference"
    plain = CASES["grouped"].build(torch.bfloat16)
    vp.attend(plain.q, plain.kv, backend="cpu")


FAULTS = {
    "the scale of K is left out": lambda kv: {"k_scale": None},
    "the scale of V is left out": lambda kv: {"v_scale": None},
    "the scales of K are swapped": lambda kv: {"k_scale": kv.k_scale.flip(0)},
    "the scales of V are swapped": lambda kv: {"v_scale": kv.v_scale.flip(0)},
    "the scale of K is off by a thousandth": lambda kv: {"k_scale": kv.k_scale * 1.001},
    "the scale of V is off by a thousandth": lambda kv: {"v_scale": kv.v_scale * 1.001},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_the_bounds_see_a_wrong_scale(fault, params_of):
    case = dataclasses.replace(FLOAT8_CASES["grouped"], scales=Scales((0.01, 0.013), (2.0, 0.7)))
    problem = case.build(torch.float32)
    exact = Exact.of(problem, params_of(problem))
    assert_output(vp.attend(problem.q, problem.kv, backend="reference"), exact, None)
    wrong = dataclasses.replace(problem.kv, **fault(problem.kv))
    with pytest.raises(AssertionError):
        assert_output(vp.attend(problem.q, wrong, backend="reference"), exact, None)


def test_a_number_is_stored_as_the_nearest_ties_to_even():
    numbers = every_code().float()
    finite = numbers[~numbers.isnan()].sort().values
    assert torch.equal(stored(finite).float(), finite)
    middle = (finite[1:] + finite[:-1]) / 2
    for shift, side in ((-1e-6, finite[:-1]), (1e-6, finite[1:])):
        got = stored(middle + shift * middle.abs().clamp(min=2**-11)).float()
        assert torch.equal(got, side)
    even = torch.where(stored(finite[1:]).view(torch.uint8) % 2 == 0, finite[1:], finite[:-1])
    assert torch.equal(stored(middle).float(), even)


def test_what_is_too_large_is_held_and_nan_stays_nan():
    x = torch.tensor([449.0, -1e30, torch.inf, -torch.inf, torch.nan, -0.0])
    got = stored(x).float()
    assert torch.equal(got[:4], LARGEST * torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert got[4].isnan() and torch.signbit(got[5])


@pytest.mark.parametrize("head_axis", (1, 2))
@by_dtype
def test_each_head_is_stored_by_its_own_scale(head_axis, dtype):
    x = Draws(0).normal(2, 3, 3, 16).to(dtype)
    scale = torch.tensor([1e-4, 0.03, 1e4])
    both = stored(x, scale, head_axis)
    assert both.dtype == FLOAT8 and both.shape == x.shape
    for g in range(3):
        one = stored(x.select(head_axis, g), scale[g])
        assert torch.equal(both.select(head_axis, g).view(torch.uint8), one.view(torch.uint8))
    exact = read(both, scale, head_axis, torch.float64)
    wanted = both.select(head_axis, 1).double() * scale[1].double()
    assert torch.equal(exact.select(head_axis, 1), wanted)


def zeros(*shape, dtype=FLOAT8):
    return torch.zeros(shape).to(dtype)


def cache(**scales):
    return vp.KVCache(zeros(2, 2, 40, 16), zeros(2, 2, 40, 16), **scales)


ERRORS = {
    "scale no tensor": (lambda: cache(k_scale=0.5), TypeError, ["k_scale", "float", "tensor("]),
    "scale dtype": (
        lambda: cache(v_scale=torch.ones(2).half()), TypeError, ["v_scale", "float16", ".float()"]
    ),
    "scale shape": (
        lambda: cache(k_scale=torch.ones(3)), ValueError, ["one number or [G=2]", "(3,)"]
    ),
    "scale rank": (
        lambda: cache(k_scale=torch.ones(2, 1)), ValueError, ["(2, 1)", "share a scale"]
    ),
    "scale device": (lambda: cache(k_scale=torch.ones(2, device="meta")), ValueError, ["meta"]),
    "scale stride": (lambda: cache(k_scale=torch.ones(4)[::2]), ValueError, ["contiguous", "(2,)"]),
    "scale of 16 bits": (
        lambda: vp.KVCache(*[zeros(1, 2, 4, 16, dtype=torch.half)] * 2, k_scale=torch.ones(1)),
        TypeError, ["k_scale", "float16", "leave it out"],
    ),
    "scale zero": (
        lambda: cache(v_scale=torch.tensor([1.0, 0.0])).validate(), ValueError, ["above 0", "0.0"]
    ),
    "scale NaN in a call": (
        lambda: vp.attend(torch.zeros(2, 4, 16), cache(k_scale=torch.tensor(torch.nan))),
        ValueError, ["k_scale", "finite", "nan"],
    ),
    "q of 64 bits": (
        lambda: vp.attend(zeros(2, 4, 16, dtype=torch.double), cache()), TypeError,
        ["q beside", "float64"],
    ),
    "q of 8 bits": (
        lambda: vp.attend(zeros(2, 4, 16), cache()), TypeError, ["not quantised", "float8_e4m3fn"]
    ),
    "v of 16 bits": (
        lambda: vp.KVCache(zeros(1, 2, 4, 16), zeros(1, 2, 4, 16, dtype=torch.half)), TypeError,
        ["share a dtype"],
    ),
    "another 8-bit float": (
        lambda: vp.KVCache(*[zeros(1, 2, 4, 16, dtype=torch.float8_e5m2)] * 2), TypeError,
        ["float8_e4m3fn", "float8_e5m2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, kind, words", ERRORS.values(), ids=ERRORS.keys())
def test_a_bad_scale_or_dtype_gets_a_clear_error(call, kind, words):
    assert_clear_error(call, kind, words)
