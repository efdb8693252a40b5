"""Every kernel once on a GPU, against the contract: in seconds, before anything longer is run."""

import itertools

import pytest
import torch

import visionpulse as vp
from visionpulse.testing import CASES, assert_scores
from visionpulse.testing.cases import Case, Scales
from visionpulse.testing.compare import Exact

pytestmark = pytest.mark.gpu

SPANS = (((4, 30), (37, 80)), ((11, 93),))
WIDE = (64, 80, 96, 128, 192, 256)
# {what q, K and V are: (dtype of q, 8 bits, head dims)}
KINDS = {
    "float32": (torch.float32, False, WIDE),
    "bfloat16": (torch.bfloat16, False, WIDE),
    "float16": (torch.float16, False, WIDE),
    "float8": (torch.bfloat16, True, (64, 128, 192, 256)),
    "float8-float32": (torch.float32, True, (64, 128, 192, 256)),
}
GROUPS = (4, 12)  # one for each head tile
ENTRIES = [
    pytest.param(kind, dim, group, id=f"{kind}-d{dim}-group{group}")
    for (kind, (_, _, dims)), group in itertools.product(KINDS.items(), GROUPS)
    for dim in dims
]
COMMON = [
    pytest.param(kind, 128, group, id=f"{kind}-d128-group{group}")
    for kind, group in itertools.product(("bfloat16", "float8"), GROUPS)
]


def build(kind, head_dim, group):
    dtype, float8, _ = KINDS[kind]
    scales = Scales((0.5, 0.03), (3.0, 0.02)) if float8 else None
    case = Case("", SPANS, heads=2 * group, head_dim=head_dim, lengths=(96, 95), scales=scales)
    return case.build(dtype, "cuda")


def check(problem, backend, check_decode, check_output):
    """An anchor with either output, a follower, a dense layer."""
    for output in ("pruned", "dense"):
        config = problem.config.updated(anchor_output=output)
        _, selection, _ = check_decode(problem, backend, config)
    q, kv, visual = problem.q, problem.kv, problem.visual
    exact = Exact.of(problem)
    check_output(vp.attend(q, kv, visual, selection, backend=backend), exact, selection, backend)
    check_output(vp.attend(q, kv, backend=backend), exact, None, backend)


@pytest.mark.backend("cuda")
@pytest.mark.parametrize("kind, head_dim, group", ENTRIES)
def test_a_kernel_of_cuda_is_the_contract(kind, head_dim, group, check_decode, check_output):
    check(build(kind, head_dim, group), "cuda", check_decode, check_output)


@pytest.mark.backend("triton")
@pytest.mark.parametrize("kind, head_dim, group", COMMON)
def test_a_common_kernel_of_triton_is_the_contract(
    kind, head_dim, group, check_decode, check_output
):
    check(build(kind, head_dim, group), "triton", check_decode, check_output)


@pytest.mark.parametrize("name", ("grouped", "paged-hnd"))
def test_the_stages_by_themselves_select_as_decode_does(on, name, params_of):
    problem = CASES[name].build(torch.bfloat16, "cuda")
    q, kv, visual, config = problem.q, problem.kv, problem.visual, problem.config
    scores, mass, mean = vp.score(q, kv, visual, config, backend=on)
    assert_scores(scores, Exact.of(problem, params_of(problem)))
    options = {"starts": kv.starts, "lengths": kv.lengths, "backend": on}
    staged = vp.select(scores, mass, visual, config, mass_mean=mean, **options)
    _, selection = vp.decode(q, kv, visual, config, backend=on)
    assert torch.equal(staged.counts, selection.counts)
