"""Steps over memory that stays, as a GPU engine captures them: the same code on CPU tensors."""

from collections import Counter

import pytest
import torch

import visionpulse as vp
from visionpulse import float8
from visionpulse.schedule import Role
from visionpulse.serving.graphs import (
    PREFILL,
    TOO_MANY_RUNS,
    GraphLayer,
    GraphSteps,
    leading,
)
from visionpulse.serving.rows import RequestRow
from visionpulse.serving.setting import Engine, of_request, setting_of
from visionpulse.serving.stats import Counters
from visionpulse.serving.step import OPTED_OUT, TEXT
from visionpulse.testing.draw import Draws

ROWS, HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 8, 2, 64, 16, 6
FULL = (True,) * 4
A, B, C = ((3, 40),), ((0, 8), (20, 60)), ((5, 90),)


def engine(**facts):
    return Engine(**{"full": FULL, "heads": HEADS, "device": "cuda", "has_graphs": True} | facts)


def setting(**asked):
    asked = {"ratio": [0.1, 0.5], "anchor": 1} | asked
    return setting_of(asked, engine())


class Tables:
    """What an engine shows: queries, pages and a block table of all its rows."""

    def __init__(self, seed=0):
        draws = Draws(seed)
        self.q = draws.normal(ROWS, HEADS, DIM)
        pool = draws.normal(ROWS * PAGES + 1, KV_HEADS, PAGE, 2 * DIM)
        self.k, self.v = pool.chunk(2, dim=3)
        self.table = (draws.permutation(ROWS * PAGES) + 1).view(ROWS, PAGES).int()
        self.lengths = torch.tensor([90, 70, 96, 50], dtype=torch.int32)

    def cache(self, rows):
        return vp.PagedKVCache(self.k, self.v, self.table[:rows], self.lengths[:rows], layout="HND")


def steps_of(own, max_runs=4):
    return GraphSteps(own, ROWS, 96, "cpu", max_runs)


def row(name, spans, wish=None):
    return RequestRow(name, spans, wish)


def run(steps, tables, step, role, rows):
    layer = GraphLayer(steps, role, DIM**-0.5)
    out = torch.full_like(tables.q[:rows], 7)
    layer.run(step, tables.q[:rows], tables.k, tables.v, out)
    return out


def make(steps, tables, known, count):
    return steps.make(known, count, tables.table, tables.lengths)


@pytest.mark.parametrize(
    "budget", ("dynamic", "fixed:0.3", "top_k:5", "top_p:0.5", "random:3"), ids=str
)
def test_rows_of_a_step_are_those_of_the_ops(budget):
    """Whatever requests were in the rows before, and however many rows there are."""
    own = setting_of({"ratio": [0.1, 0.5], "anchor": 1, "budget": budget}, engine(has_graphs=False))
    steps, tables, config = steps_of(own), Tables(), own.config
    for number, spans in enumerate(([A, B], [B, C, A], [A], [C, (), A, B])):
        known = [row(f"{number}{i}", one) for i, one in enumerate(spans)]
        n = len(spans)
        step = make(steps, tables, known, n)
        got = run(steps, tables, step, Role.ANCHOR, n)
        kept, visual = step.buffers.selection, vp.VisualTokens.from_spans(spans, capacity=96)
        if budget.startswith("random"):
            n_visual = visual.visible_counts(96, None, tables.lengths[:n], 0)
            ratio = step.buffers.ratio
            assert torch.equal(kept.counts, (ratio * n_visual).floor().int())
        else:
            out, chosen = vp.decode(tables.q[:n], tables.cache(n), visual, config)
            assert torch.equal(got, out) and torch.equal(kept.indices, chosen.indices)
            assert torch.equal(kept.counts, chosen.counts)
        followed = run(steps, tables, step, Role.FOLLOWER, n)
        wanted = vp.attend(tables.q[:n], tables.cache(n), visual, kept)
        assert torch.equal(followed, wanted)


def test_drafted_tokens_of_a_row_are_decode_rows_of_their_own():
    own, tables, queries = setting(), Tables(), 3
    steps = GraphSteps(own, ROWS, 96, "cpu", max_queries=queries)
    known = [row("a", A), row("b", B, "off"), row("c", ())]
    step = steps.make(known, 3, tables.table, tables.lengths, queries=queries)
    q = Draws(1).normal(3 * queries, HEADS, DIM)
    visual = vp.VisualTokens.from_spans([A, (), ()], capacity=96)
    by_row = q.view(3, queries, HEADS, DIM)
    out, kept = vp.decode(by_row, tables.cache(3), visual, own.config)
    followed = vp.attend(by_row, tables.cache(3), visual, kept)
    for role, wanted in ((Role.ANCHOR, out), (Role.FOLLOWER, followed)):
        got = torch.full_like(q, 7)
        GraphLayer(steps, role, DIM**-0.5).run(step, q, tables.k, tables.v, got)
        torch.testing.assert_close(got, wanted.flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert torch.equal(step.buffers.selection.indices, kept.indices)
    totals = steps.counters.totals()
    assert totals.sparse_rows == sum(totals.mass.counts) == queries
    assert totals.dense_rows == {OPTED_OUT: queries, TEXT: queries}


def test_layers_before_the_anchor_follow_what_each_request_kept_in_its_last_step():
    """Requests come, change rows, are away for a step and come back; one has no picture."""
    own = setting_of({"ratio": [0.1, 0.5], "anchor": 2, "schedule": "lookback", "refresh": 3},
                     engine())  # fmt: skip
    steps, tables, kept, turns = steps_of(own), Tables(), {}, Counter()
    early = [GraphLayer(steps, Role.FOLLOWER, DIM**-0.5, layer=i) for i in (0, 1)]
    anchor = GraphLayer(steps, Role.ANCHOR, DIM**-0.5, layer=2)
    spans, followed = {"a": A, "b": B, "c": C, "t": ()}, 0
    for number, names in enumerate(("ab", "ba", "bca", "bcat", "tcb", "cab", "abc", "abct")):
        known, n = [row(name, spans[name]) for name in names], len(names)
        step = make(steps, tables, known, n)
        q = Draws(number).normal(3, n, HEADS, DIM)
        outs = torch.zeros_like(q)
        for layer, own_q, out in zip((*early, anchor), q, outs, strict=True):
            layer.run(step, own_q, tables.k, tables.v, out)
        for gone in set(kept) - set(names):
            del kept[gone], turns[gone]
        for i, name in enumerate(names):
            cut = slice(i, i + 1)
            cache = vp.PagedKVCache(
                tables.k, tables.v, tables.table[cut], tables.lengths[cut], layout="HND"
            )
            visual = vp.VisualTokens.from_spans([spans[name]], capacity=96)
            follows = name in kept and turns[name] % 3 and spans[name]
            followed += bool(follows)
            pruned = (visual, kept[name]) if follows else (None, None)
            for j in (0, 1):
                wanted = vp.attend(q[j, cut], cache, *pruned)
                torch.testing.assert_close(outs[j, cut], wanted, rtol=1e-5, atol=1e-6)
            kept[name] = vp.decode(q[2, cut], cache, visual, own.config)[1]
            turns[name] += 1
    assert followed > 8


def test_the_scratch_of_every_step_is_there_once_the_largest_was_reserved():
    own, tables = setting(), Tables()
    steps = GraphSteps(own, ROWS, 96, "cpu", max_queries=2)
    layer = GraphLayer(steps, Role.ANCHOR, DIM**-0.5)
    layer.reserve(tables.q[:1], KV_HEADS, tables.q.dtype, 96)
    taken = {key: (t.data_ptr(), t.numel()) for key, t in steps.workspace._buffers.items()}
    assert taken and steps.counters.totals() == Counters().totals()
    tables.lengths[:] = 96
    known = [row(str(i), ((0, 95),)) for i in range(ROWS)]  # the CPU's own size follows the runs
    for queries in (1, 2):
        step = steps.make(known, ROWS, tables.table, tables.lengths, queries=queries)
        q = Draws(2).normal(ROWS * queries, HEADS, DIM)
        for role in (Role.ANCHOR, Role.FOLLOWER):
            GraphLayer(steps, role, DIM**-0.5).run(step, q, tables.k, tables.v, q.clone())
    now = {key: (t.data_ptr(), t.numel()) for key, t in steps.workspace._buffers.items()}
    assert now == taken


def test_rows_that_are_ours_have_as_many_tokens_each():
    assert leading([3, 3, 3], 3) == (3, 3) and leading([1, 1, 9], 3) == (2, 1)
    assert leading([3, 2, 3], 3) == (1, 3) and leading([4, 4], 3) == (0, 1) == leading([], 3)
    assert leading([3, 3, 0, 0], 3) == (4, 3)  # the padding of a graph


def test_pages_of_8_bits_are_read_with_the_scales_of_the_layer():
    """A scale for all numbers as vLLM has it by default, or for each KV head."""
    own, tables = setting(), Tables()
    steps = steps_of(own)
    visual = vp.VisualTokens.from_spans([A, B], capacity=96)
    for scales in ((torch.tensor(0.02), torch.tensor([0.01])), (torch.tensor([0.02, 0.03]), None)):
        k, v = (float8.stored(t, s) for t, s in zip((tables.k, tables.v), scales, strict=True))
        step = make(steps, tables, [row("a", A), row("b", B)], 2)
        layer, out = GraphLayer(steps, Role.ANCHOR, DIM**-0.5), torch.empty_like(tables.q[:2])
        layer.run(step, tables.q[:2], k, v, out, scales)
        cache = vp.PagedKVCache(k, v, tables.table[:2], tables.lengths[:2], None, "HND", *scales)
        wanted, kept = vp.decode(tables.q[:2], cache, visual, own.config)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(step.buffers.selection.indices, kept.indices)


def test_all_steps_read_and_write_the_same_memory():
    """What a captured graph was given is what later steps write."""
    steps, tables, config = steps_of(setting()), Tables(), setting().config
    captured = make(steps, tables, [], 3)
    later = make(steps, tables, [row("a", A), row("b", ())], 3)
    assert later.buffers is captured.buffers
    visual = captured.buffers.visual
    assert visual.counts.tolist() == [37, 0, 0]
    wide = make(steps, tables, [row("a", A)], 4).buffers
    pairs = (
        (visual.spans, wide.visual.spans),
        (captured.buffers.selection.indices, wide.selection.indices),
    )
    for narrow, all_rows in pairs:
        assert narrow.data_ptr() == all_rows.data_ptr()
    assert wide.selection.indices.shape == (4, config.k_max(96))


def test_a_capture_has_empty_rows_and_gives_dense_attention():
    steps, tables = steps_of(setting()), Tables()
    step = make(steps, tables, [], 3)
    dense = vp.attend(tables.q[:3], tables.cache(3))
    for role in (Role.ANCHOR, Role.FOLLOWER):
        torch.testing.assert_close(run(steps, tables, step, role, 3), dense, rtol=1e-5, atol=1e-6)
    assert step.buffers.selection.counts.tolist() == [0, 0, 0]
    assert (step.buffers.selection.indices == -1).all()


def test_a_row_that_must_be_dense_is_empty_and_counted_by_reason():
    own = setting()
    steps, tables = steps_of(own, max_runs=2), Tables()
    many = ((0, 1), (2, 3), (4, 5))
    known = [row("a", A), None, row("c", A, "off"), row("d", many)]
    step = make(steps, tables, known, 4)
    assert step.buffers.visual.counts.tolist() == [37, 0, 0, 0]
    make(steps, tables, [row("e", ())], 1)
    totals = steps.counters.totals()
    assert totals.sparse_rows == 1
    assert totals.dense_rows == {PREFILL: 1, OPTED_OUT: 1, TOO_MANY_RUNS: 1, TEXT: 1}


def test_a_step_without_visual_tokens_is_left_to_the_engine_and_its_graph_finds_empty_rows():
    own = setting()
    steps, tables = steps_of(own), Tables()
    held = make(steps, tables, [row("a", A)], 1).buffers.visual
    assert make(steps, tables, [row("b", ())], 1) is None
    assert held.counts.tolist() == [0]


def test_only_rows_whose_request_changed_are_written():
    own = setting()
    steps, tables = steps_of(own), Tables()
    known = [row("a", A), row("b", B), row("c", C)]
    make(steps, tables, known, 3)
    for table in steps._spans.tables:
        table.fill_(-5)  # as a write would not
    make(steps, tables, known, 3)
    assert all((table == -5).all() for table in steps._spans.tables)
    known[1] = row("d", A)
    make(steps, tables, known, 3)
    for table in steps._spans.tables:
        assert (table[[0, 2, 3]] == -5).all() and (table[1] != -5).all()


def test_padding_behind_the_requests_is_empty():
    own = setting()
    steps, tables = steps_of(own), Tables()
    make(steps, tables, [row(str(i), A) for i in range(4)], 4)
    step = make(steps, tables, [row("0", A)], 4)
    tables.lengths[2:] = 0
    out = run(steps, tables, step, Role.ANCHOR, 4)
    assert step.buffers.visual.counts.tolist() == [37, 0, 0, 0]
    assert not out[2:].any()


def test_what_a_gpu_engine_cannot_do_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"lookback.*speculative"):
        setting_of({"schedule": "lookback"}, engine(has_drafts=True))
    with pytest.raises(ValueError, match=r"between score and select.*without graphs"):
        setting(budget="top_p:0.5")
    own = setting()
    assert of_request("off", own) is None and of_request(None, own) is own.config
    with pytest.raises(ValueError, match=r"'top_k:3'.*engine of its own"):
        of_request("top_k:3", own)
