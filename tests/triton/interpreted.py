"""What the shared suite does not test: launches, values out of range, offsets past 2**31 elements.

Run by `interpret.py`, beside the shared suite.
"""

from contextlib import contextmanager

import launches
import numpy as np
import pytest
import torch

import visionpulse as vp
from visionpulse.backends import BackendUnavailableError, get
from visionpulse.cache import KVCache, PagedKVCache
from visionpulse.call import Call
from visionpulse.selection import Selection
from visionpulse.testing import CASES
from visionpulse.testing.compare import (
    Exact,
    assert_counts,
    assert_masses,
    assert_scores,
    assert_valid_selection,
)
from visionpulse.workspace import Workspace

FAR = 2**31 + 8  # elements


@contextmanager
def counted():
    """Names of the kernels launched inside."""
    names, originals = [], {}

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name, place in launches.PLACES.items():
        originals[name] = getattr(place, name)
        setattr(place, name, Counted(name, originals[name]))
    try:
        yield names
    finally:
        for name, place in launches.PLACES.items():
            setattr(place, name, originals[name])


@pytest.mark.parametrize(
    "name, score, output, most",
    (
        ("grouped", "prob", "pruned", 3),
        ("grouped", "logit", "pruned", 3),
        ("grouped", "prob", "dense", 2),
        ("grouped", "logit", "dense", 2),
        # and no more for a long row
        ("long", "prob", "pruned", 3),
        ("long", "logit", "dense", 2),
    ),
)
def test_a_step_takes_few_launches(name, score, output, most):
    problem = CASES[name].build(torch.bfloat16, "cpu")
    config = problem.config.updated(score=score, anchor_output=output)
    q, kv, visual = problem.q, problem.kv, problem.visual
    with counted() as anchor:
        _, selection = vp.decode(q, kv, visual, config, backend="triton")
    with counted() as others:
        vp.attend(q, kv, visual, selection, backend="triton")
        vp.attend(q, kv, backend="triton")
    assert len(anchor) == most, anchor
    assert others == ["_attend_kernel", "_score_kernel"]


SCORE, SELECT, ATTEND = launches.PLACES
LONG = 131072  # slots


@pytest.mark.parametrize("page", (0, 16))
@pytest.mark.parametrize("capacity", (4096, LONG))
def test_a_launch_depends_on_no_value_in_a_tensor(page, capacity):
    """Meta tensors hold no values: to read one on the host raises, or to take a shape from it."""
    shape = launches.Shape(page=page, capacity=capacity)
    calls = [
        ([SCORE], launches.dense, {}),
        ([ATTEND], launches.follow, {}),
        ([SELECT], launches.select, {}),
        ([SCORE, SELECT], launches.score, {}),
    ]
    for score in ("prob", "logit", "prob_tau"):
        anchor = [SCORE, SELECT]
        calls.append((anchor, launches.decode, {"score": score, "output": "dense"}))
        calls.append(([*anchor, ATTEND], launches.decode, {"score": score, "output": "pruned"}))
    for wanted, call, options in calls:
        with launches.recorded("sm_90") as found:
            call(shape, **options)
        assert [one.kernel.__name__ for one in found] == wanted


@pytest.mark.parametrize("output", ("pruned", "dense"))
def test_scratch_is_written_before_it_is_read(output):
    """All but the counters, which their kernels reset to zero."""
    problem = CASES["ragged"].build(torch.bfloat16, "cpu")
    q, kv, visual = problem.q, problem.kv, problem.visual
    config = problem.config.updated(anchor_output=output)
    workspace, results = Workspace(), []
    for _ in range(2):
        out, selection = vp.decode(q, kv, visual, config, workspace=workspace, backend="triton")
        follow = vp.attend(q, kv, visual, selection, workspace=workspace, backend="triton")
        results.append((out, follow, selection.indices, selection.mass))
        for (name, *_), buffer in workspace._buffers.items():
            if name.endswith(("arrived", "histogram")):
                assert not buffer.any(), name
            else:
                buffer.fill_(torch.nan if buffer.is_floating_point() else -7)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.fixture
def check_unchecked(check_output):
    """The same call as `check_decode`, without what `vp.decode` refuses."""

    def check(q, kv, visual, params):
        scores = torch.empty(kv.batch, kv.capacity)
        call = Call(q, kv, params, visual, scores=scores, workspace=Workspace())
        out, selection = get("triton").decode(call)
        exact = Exact(q, kv, visual, params)
        assert_masses(selection.mass, selection.mass_mean, exact)
        assert_scores(scores, exact)
        assert_counts(selection, exact.n_visual, params)
        assert_valid_selection(selection, scores, exact.candidate)
        kept = selection if params.anchor_output == "pruned" else None
        check_output(out, exact, kept, "triton")
        return selection

    return check


@pytest.mark.parametrize("output", ("pruned", "dense"))
def test_page_ids_out_of_range_are_skipped(output, params_of, check_unchecked):
    problem = CASES["paged-nhd"].build(torch.float32, "cpu")
    kv = problem.kv
    table = kv.block_table.clone()
    table[0, 1], table[1, 0] = -7, 2**31 - 1
    kv = PagedKVCache(kv.k_pages, kv.v_pages, table, kv.lengths, kv.starts, kv.layout)
    params = params_of(problem)._replace(anchor_output=output)
    check_unchecked(problem.q, kv, problem.visual, params)


def test_lengths_and_starts_out_of_range_are_clamped(params_of, check_unchecked):
    problem = CASES["grouped"].build(torch.float32, "cpu")
    kv, params = problem.kv, params_of(problem)
    lengths = torch.tensor([2**31 - 1, -5], dtype=torch.int32)
    starts = torch.tensor([-3, 4], dtype=torch.int32)
    kv = KVCache(kv.k, kv.v, lengths, starts)
    selection = check_unchecked(problem.q, kv, problem.visual, params)
    assert selection.counts[1] == 0


def test_selected_positions_out_of_range_are_skipped(params_of, check_output):
    """And so are positions of text, which is attended once anyway."""
    problem = CASES["grouped"].build(torch.float32, "cpu")
    q, kv, visual, params = problem.q, problem.kv, problem.visual, params_of(problem)
    indices = torch.tensor([[-9, 2, 5, 40, 96, 2**31 - 1], [11, 12, 13, 95, -1, -1]])
    counts = torch.tensor([6, 99], dtype=torch.int32)
    mass = torch.zeros(2)
    selection = Selection(indices.int(), counts, mass, mass, trusted=True)
    call = Call(q, kv, params, visual, selection, workspace=Workspace())
    out = get("triton").attend(call)
    check_output(out, Exact(q, kv, visual, params), selection, "triton")


def test_an_index_list_longer_than_the_cache_is_attended(params_of, check_output):
    """It has more programs than the slots need; no program may wait for one that does not run."""
    problem = CASES["grouped"].build(torch.float32, "cpu")
    q, kv, visual, params = problem.q, problem.kv, problem.visual, params_of(problem)
    indices = torch.full((2, 500), 2**31 - 1, dtype=torch.int32)
    indices[:, :3] = torch.tensor([5, 40, 96])
    counts = torch.tensor([500, 500], dtype=torch.int32)
    mass = torch.zeros(2)
    selection = Selection(indices, counts, mass, mass, trusted=True)
    call = Call(q, kv, params, visual, selection, workspace=Workspace())
    for _ in range(2):
        out = get("triton").attend(call)
    check_output(out, Exact(q, kv, visual, params), selection, "triton")


def far_apart(t, axis):
    """A copy whose `axis` has a stride past 2**31 elements; memory never touched costs nothing."""
    memory = torch.from_numpy(np.empty(FAR * (t.shape[axis] - 1) + t.numel(), np.float16))
    strides = list(t.contiguous().stride())
    strides[axis] = FAR
    view = memory.as_strided(t.shape, strides)
    view.copy_(t)
    return view


@pytest.mark.parametrize("paged", (False, True))
def test_offsets_pass_32_bits(paged, params_of, check_output):
    problem = CASES["paged-hnd" if paged else "grouped"].build(torch.float16, "cpu")
    kv = problem.kv
    if paged:
        # two pages, the second far away
        table = torch.tensor([[0], [1]], dtype=torch.int32)
        pools = (far_apart(t[table[:, 0].long()], 0) for t in (kv.k_pages, kv.v_pages))
        pools = [pool.nan_to_num_(0.5) for pool in pools]
        lengths = torch.tensor([kv.page_size, kv.page_size - 2], dtype=torch.int32)
        kv = PagedKVCache(*pools, table, lengths, None, kv.layout)
        visual = vp.VisualTokens.from_spans([((1, 9),), ((3, 8),)])
    else:
        kv = KVCache(far_apart(kv.k, 0), far_apart(kv.v, 0), kv.lengths, kv.starts)
        visual = problem.visual
    assert kv.k_strides[0] > 2**31 - 1
    out, selection = vp.decode(problem.q, kv, visual, problem.config, backend="triton")
    params = params_of(problem._replace(visual=visual))
    exact = Exact(problem.q, kv, visual, params)
    check_output(out, exact, selection, "triton")
    follow = vp.attend(problem.q, kv, visual, selection, backend="triton")
    check_output(follow, exact, selection, "triton")


def test_float64_is_refused():
    problem = CASES["grouped"].build(torch.float32, "cpu")
    kv = KVCache(problem.kv.k.double(), problem.kv.v.double())
    with pytest.raises(BackendUnavailableError, match="float64"):
        vp.attend(problem.q.double(), kv, backend="triton")
