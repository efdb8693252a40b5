"""Tables and results in memory of the caller, as an engine with graphs needs, on every backend."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import visionpulse as vp
from visionpulse.layer_ops import LayerOps, paged_cache_of
from visionpulse.testing import CASES, Half
from visionpulse.testing.compare import Exact
from visionpulse.visual import span_row

RATIO = (0.05, 0.5)


CONFIGS = {
    "pruned": vp.PulseConfig(ratio=RATIO),
    "dense-logit": vp.PulseConfig(ratio=RATIO, anchor_output="dense", score="logit"),
    "fixed": vp.PulseConfig(budget=vp.Fixed(0.3)),
    "top-k": vp.PulseConfig(budget=vp.TopK(7)),
    "top-p": vp.PulseConfig(budget=vp.TopP(0.5)),
    "between": vp.PulseConfig(budget=Half(), anchor_output="dense"),
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
by_name = pytest.mark.parametrize("name", ("grouped", "paged-hnd", "no-visual"))


def tables(rows, max_runs, device="cpu"):
    """The three tables of rows of runs, as an engine keeps them."""
    made = [span_row(runs, max_runs) for runs in rows]
    return [
        torch.tensor(part, dtype=torch.int32, device=device) for part in zip(*made, strict=True)
    ]


def parts(selection):
    return selection.indices, selection.counts, selection.mass, selection.mass_mean


def assert_same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def soiled(rows, k_max, device="cpu"):
    """Buffers that hold something else."""
    given = vp.Selection.empty(rows, k_max, device)
    for tensor in parts(given):
        tensor.fill_(77)
    return given


@pytest.mark.bits
@by_config
@by_name
def test_decode_and_select_fill_the_buffers_of_a_caller(backend, device, name, config):
    problem = CASES[name].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    wanted_out, wanted = vp.decode(q, kv, visual, config, backend=backend)
    given = soiled(kv.batch, config.k_max(visual.max_count), device)
    out, selection = vp.decode(q, kv, visual, config, selection=given, backend=backend)
    assert_same((out, *parts(given)), (wanted_out, *parts(wanted)))
    assert all(a is b for a, b in zip(parts(selection), parts(given), strict=True))
    assert selection.trusted

    scores, mass, mean = vp.score(q, kv, visual, config, backend=backend)
    options = {"mass_mean": mean, "starts": kv.starts, "lengths": kv.lengths, "backend": backend}
    chosen = vp.select(scores, mass, visual, config, **options)
    given = soiled(kv.batch, config.k_max(visual.max_count), device)
    selection = vp.select(scores, mass, visual, config, selection=given, **options)
    assert_same(parts(given), parts(chosen))
    assert all(a is b for a, b in zip(parts(selection), parts(given), strict=True))


@pytest.mark.bits
@by_name
def test_tables_of_a_caller_are_the_set_that_they_hold(backend, device, name):
    """However wide they are, and whatever their rows held before."""
    problem = CASES[name].build(torch.float32, device)
    q, kv, config = problem.q, problem.kv, problem.config
    held = tables([((0, 5),)] * kv.batch, 9, device)
    visual = vp.VisualTokens.over(*held, capacity=96)
    vp.decode(q, kv, visual, config, backend=backend)
    for into, new in zip(held, tables(problem.case.visual, 9, device), strict=True):
        into.copy_(new)
    wanted = vp.VisualTokens.from_spans(problem.case.visual, capacity=96, device=device)
    for options in ({}, {"selection": vp.Selection.empty(kv.batch, config.k_max(96), device)}):
        out, got = vp.decode(q, kv, visual, config, backend=backend, **options)
        expected, chosen = vp.decode(q, kv, wanted, config, backend=backend)
        assert_same((out, *parts(got)), (expected, *parts(chosen)))
        followed = vp.attend(q, kv, visual, got, backend=backend)
        assert torch.equal(followed, vp.attend(q, kv, wanted, chosen, backend=backend))


def test_a_row_of_count_0_attends_densely(backend, device, check_output, params_of):
    problem = CASES["paged-nhd"].build(torch.float32, device)
    q, kv = problem.q, problem.kv
    visual = vp.VisualTokens.over(*tables([problem.case.visual[0], ()], 4, device), capacity=80)
    given = soiled(2, problem.config.k_max(80), device)
    out, kept = vp.decode(q, kv, visual, problem.config, selection=given, backend=backend)
    assert kept.counts[0] > 0 and kept.counts[1] == 0 and (kept.indices[1] == -1).all()
    assert kept.mass[1] == 0
    exact = Exact(q, kv, visual, params_of(problem))
    check_output(out, exact, kept, backend)
    dense = Exact(q[1:], rows_of(kv, 1), visual.rows(torch.tensor([1])), exact.params)
    check_output(out[1:], dense, None, backend)
    followed = vp.attend(q, kv, visual, kept, backend=backend)
    check_output(followed[1:], dense, None, backend)


def rows_of(kv, b):
    cut = slice(b, b + 1)
    return vp.PagedKVCache(
        kv.k_pages, kv.v_pages, kv.block_table[cut], kv.lengths[cut], layout=kv.layout
    )


@pytest.mark.bits
def test_one_graph_follows_tables_that_change(backend):
    """Under torch.compile: one graph, filled buffers, the bits of eager calls."""
    torch._dynamo.reset()
    problem, graphs = CASES["paged-nhd"].build(torch.float32), []
    q, kv, config = problem.q, problem.kv, problem.config

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(spans, offsets, counts, given):
        visual = vp.VisualTokens.over(spans, offsets, counts, capacity=80)
        out, kept = vp.decode(q, kv, visual, config, selection=given, backend=backend)
        return out, vp.attend(q, kv, visual, kept, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend=count)
    for rows in (problem.case.visual, ((), ((1, 2), (4, 60))), ((), ())):
        given, wanted = (soiled(2, config.k_max(80)) for _ in range(2))
        held = tables(rows, 4)
        assert_same(compiled(*held, given), run(*held, wanted))
        assert_same(parts(given), parts(wanted))
    assert len(graphs) == 1


class Counted(TorchDispatchMode):
    """The operations of torch that ran."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.bits
@pytest.mark.parametrize("name", ("paged-nhd", "odd-page"))
def test_a_checked_shape_of_a_paged_cache_repeats_without_checks(backend, device, name):
    """Same bits as the checked ops, and on native kernels no operation of torch in a layer."""
    problem = CASES[name].build(torch.float32, device)
    q, kv, config = problem.q, problem.kv, problem.config
    visual = vp.VisualTokens.over(*tables(problem.case.visual, 4, device), capacity=80)
    layer_ops = LayerOps(q, kv, visual, config.updated(backend=backend))
    same = paged_cache_of(kv.k_pages, kv.v_pages, kv.block_table, kv.lengths, kv.layout)
    given, workspace = soiled(2, config.k_max(80), device), vp.Workspace()
    outs = [torch.empty_like(q) for _ in range(3)]

    def layers():
        _, kept = layer_ops.decode(q, same, visual, workspace, outs[0], given)
        layer_ops.attend(q, same, visual, kept, workspace, outs[1])
        layer_ops.attend(q, same, None, None, workspace, outs[2])

    layers()  # scratch memory grows
    for into in (*outs, *parts(given)):
        into.fill_(77)
    with Counted() as counted:
        layers()
    assert backend not in ("cpu", "cuda") or not counted.ops
    out, kept = vp.decode(q, kv, visual, config, backend=backend)
    followed = vp.attend(q, kv, visual, kept, backend=backend)
    assert_same(
        (*outs, *parts(given)), (out, followed, vp.attend(q, kv, backend=backend), *parts(kept))
    )


@pytest.mark.bits
def test_a_drawn_ratio_stands_in_for_the_mass(backend, device):
    problem = CASES["paged-nhd"].build(torch.float32, device)
    q, kv, visual = problem.q, problem.kv, problem.visual
    config = vp.PulseConfig(budget=vp.Random(3), ratio=(0.1, 0.9), backend=backend)
    layer_ops = LayerOps(q, kv, visual, config)
    ratio = torch.tensor([0.25, 0.5], device=device)
    for share in (1.0, 0.5):  # the buffer is read anew, nothing is drawn
        kept = layer_ops.decode(q, kv, visual, vp.Workspace(), ratio=ratio.mul_(share))[1]
        n_visual = visual.visible_counts(kv.capacity, kv.starts, kv.lengths, 0)
        wanted = (ratio.clamp(0.1, 0.9) * n_visual).floor().int()
        assert torch.equal(kept.counts, wanted)


# Physical orders of (layer, block, head, slot, both) that vLLM stores its blocks in.
ORDERS = ("01234", "01324", "02134", "10234", "10324", "12034")


@pytest.mark.bits
@pytest.mark.parametrize("order", ORDERS)
def test_keys_and_values_of_any_physical_order_are_read_in_place(backend, device, order):
    """Keys in the first half of a slot and values in the second, whatever lies outermost."""
    problem = CASES["paged-hnd"].build(torch.bfloat16, device)
    q, kv, visual, config = problem.q, problem.kv, problem.visual, problem.config
    one = torch.cat((kv.k_pages, kv.v_pages), dim=3)
    logical = torch.stack((torch.full_like(one, torch.nan), one))  # [layers, blocks, G, slots, 2 D]
    wanted, chosen = vp.decode(q, kv, visual, config, backend=backend)
    dense = vp.attend(q, kv, backend=backend)
    axes = [int(axis) for axis in order]
    stored = logical.permute(axes).contiguous()
    k, v = stored.permute([axes.index(axis) for axis in range(5)])[1].chunk(2, dim=3)
    here = vp.PagedKVCache(k, v, kv.block_table, kv.lengths, kv.starts, "HND")
    out, kept = vp.decode(q, here, visual, config, backend=backend)
    assert_same((out, *parts(kept)), (wanted, *parts(chosen)))
    assert torch.equal(vp.attend(q, here, backend=backend), dense)


def refused(kind, call, buffers, *words):
    buffers = [tensor for tensor in buffers if tensor.device.type != "meta"]
    before = [tensor.clone() for tensor in buffers]
    with pytest.raises(kind) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert_same(buffers, before)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    problem = CASES["grouped"].build(torch.float32)
    q, kv, config = problem.q, problem.kv, problem.config
    k_max = config.k_max(problem.visual.max_count)
    out = torch.full_like(q, 5)

    def given(**changes):
        return vp.Selection(**(soiled(2, k_max).__dict__ | changes))

    def step(selection, visual=problem.visual):
        return lambda: vp.decode(q, kv, visual, config, out=out, selection=selection)

    def check(kind, selection, *words, **more):
        buffers = [out, *(parts(selection) if isinstance(selection, vp.Selection) else ())]
        refused(kind, step(selection, **more), buffers, *words)

    narrow, wide = (torch.full((2, k_max + n), 7, dtype=torch.int32) for n in (-1, 1))
    check(TypeError, narrow, "Selection", "Selection.empty")
    for indices in (narrow, wide, wide[:, 1:].t().contiguous()):
        check(ValueError, given(indices=indices), "selection.indices", str((2, k_max)))
    check(ValueError, given(indices=wide[:, 1:]), "selection.indices", "contiguous")
    check(TypeError, given(indices=wide[:, 1:].long().contiguous()), "indices", "int32", "int64")
    check(TypeError, given(mass=torch.zeros(2).double()), "selection.mass", "float32")
    check(ValueError, given(counts=torch.zeros(3, dtype=torch.int32)), "selection.counts", "(2,)")
    there = torch.zeros(2, device="meta")
    check(ValueError, given(mass_mean=there), "selection.mass_mean", "meta", "cpu")

    for spoil, words in (
        (lambda s, o, c: s[0, 0].copy_(torch.tensor([9, 4])), ("spans", "span_row")),
        (lambda s, o, c: s[0, 1].copy_(s[0, 0]), ("spans", "ascending")),
        (lambda s, o, c: o[1, 1:].add_(1), ("offsets", "span_row")),
        (lambda s, o, c: c[:1].add_(1), ("counts", "span_row")),
    ):
        held = tables(problem.case.visual, 4)
        visual = vp.VisualTokens.over(*held, capacity=problem.visual.max_count)
        spoil(*held)
        check(ValueError, given(), *words, visual=visual)
    held = tables(problem.case.visual, 4)
    small = vp.VisualTokens.over(*held, capacity=9)
    refused(ValueError, lambda: vp.decode(q, kv, small), [out], "80", "capacity is 9")
