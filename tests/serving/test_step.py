"""The decode rows of a serving step say what the ops say of each row by itself."""

import pytest
import torch

import visionpulse as vp
from visionpulse.backends.cpu import write_pages
from visionpulse.models.tensor_parallel import HeadGroup
from visionpulse.serving.rows import RequestRow
from visionpulse.serving.setting import Engine, setting_of
from visionpulse.serving.stats import Counters
from visionpulse.serving.step import Layer, Steps

LAYERS, HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 4, 2, 32, 16, 40
SPANS = (((2, 40), (50, 60)), (), ((5, 70),), ((0, 33),))
LENGTHS = (64, 20, 90, 50)
SMALL = {"tau": 0.3, "ratio": [0.05, 0.4]}


class Engines:
    """An engine of four layers, its cache filled at random, and the same by the ops alone."""

    def __init__(self, asked, spans=SPANS, lengths=LENGTHS, wishes=(None,) * 4):
        self.setting = setting_of(asked, Engine(full=(True,) * LAYERS, heads=HEADS))
        self.counters = Counters()
        self.steps = Steps(self.setting, 8, self.counters)
        self.layers = [Layer(self.steps, i, DIM**-0.5) for i in range(LAYERS)]
        random = torch.Generator().manual_seed(4)
        shape = (PAGES, KV_HEADS, PAGE, 2 * DIM)
        self.caches = [torch.randn(shape, generator=random) for _ in range(LAYERS)]
        self.table = torch.randperm(PAGES, generator=random).to(torch.int32).view(4, 10)
        self.random = random
        self.rows = [
            RequestRow(f"r{i}", own, wish)
            for i, (own, wish) in enumerate(zip(spans, wishes, strict=True))
        ]
        self.lengths = torch.tensor(lengths, dtype=torch.int32)

    def step(self):
        """One step through all layers: queries, outputs and selections by layer."""
        host = self.lengths.tolist()
        step = self.steps.make(self.rows, self.table, self.lengths, host)
        q = torch.randn(LAYERS, len(self.rows), HEADS, DIM, generator=self.random)
        outs, selections = torch.zeros_like(q), []
        for i, layer in enumerate(self.layers):
            layer.run(step, q[i], *self.caches[i].chunk(2, dim=3), outs[i])
            selections.append(step.selection)
        return q, outs, selections

    def row(self, layer, i):
        """The cache of one row."""
        k, v = self.caches[layer].chunk(2, dim=3)
        cut = slice(i, i + 1)
        return vp.PagedKVCache(k, v, self.table[cut], self.lengths[cut], layout="HND")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_step(engines, made, configs, kept=None):
    """Hold each row against the ops; `kept` are selections of the step before, by row."""
    q, outs, _ = made
    last = []
    for i, row in enumerate(engines.rows):
        selection = kept[i] if kept else None
        visual = vp.VisualTokens.from_spans([row.spans]) if row.spans and configs[i] else None
        for layer, role in enumerate(engines.setting.roles):
            cache, own = engines.row(layer, i), q[layer, i : i + 1]
            if visual is not None and role.value == "anchor":
                expected, selection = vp.decode(own, cache, visual, configs[i])
            elif visual is not None and role.value == "follower" and selection is not None:
                expected = vp.attend(own, cache, visual, selection)
            else:
                expected = vp.attend(own, cache)
            close(outs[layer, i : i + 1], expected)
        last.append(selection)
    return last


@pytest.mark.parametrize(
    "asked",
    [
        {"preset": "10pct", "anchor": 1},
        SMALL | {"anchor": [0, 2]},
        SMALL | {"schedule": "per_layer"},
        SMALL | {"anchor": 1, "budget": "top_k:7"},
        SMALL | {"anchor": 1, "budget": "fixed:0.2"},
        SMALL | {"anchor": 1, "budget": "top_p:0.4"},
        SMALL | {"anchor": 1, "anchor_output": "dense"},
        SMALL | {"anchor": 3, "mass": "mean", "score": "logit"},
    ],
    ids=str,
)
def test_rows_with_and_without_pictures_are_those_of_the_ops(asked):
    engines = Engines(asked)
    for _ in range(2):
        check_step(engines, engines.step(), [engines.setting.config] * 4)
        engines.lengths += 1


def test_a_random_budget_stays_within_its_bounds():
    engines = Engines(SMALL | {"anchor": 1, "budget": "random:5"})
    _, _, selections = engines.step()
    counts, visual = selections[-1].counts.tolist(), [48, 0, 65, 33]
    assert all(n * 0.04 < c <= n * 0.4 or n == c == 0 for c, n in zip(counts, visual, strict=True))


def test_requests_have_budgets_of_their_own_and_may_opt_out():
    wishes = ("top_k:5", None, "off", None)
    engines = Engines(SMALL | {"anchor": 1}, wishes=wishes)
    config = engines.setting.config
    own = [config.updated(budget="top_k:5"), config, None, config]
    made = engines.step()
    check_step(engines, made, own)
    assert made[2][-1].counts.tolist()[:3] == [5, 0, 0]
    assert engines.counters.totals().dense_rows == {"no visual tokens": 1, "opted out": 1}


def test_what_layers_remember_does_not_grow_with_the_pictures():
    """K_max is that of each step, and requests bring new pictures for months."""
    engines = Engines(SMALL | {"anchor": 1, "budget": "top_k:7"})
    for end in (40, 8, 33, 12, 20):
        engines.rows = [RequestRow(f"r{i}", ((2, end + i),)) for i in range(4)]
        engines.lengths = torch.full((4,), end + 9, dtype=torch.int32)
        check_step(engines, engines.step(), [engines.setting.config] * 4)
    (ops,) = engines.layers[1]._ops.values()
    assert len(ops._budgets) == 1


def test_a_wish_that_nobody_refused_leaves_its_request_dense():
    engines = Engines(SMALL | {"anchor": 1}, wishes=({"a": 1}, "nonsense", "top_k:x", 7))
    q, outs, _ = engines.step()
    close(outs[3, :1], vp.attend(q[3, :1], engines.row(3, 0)))


def test_layers_before_the_anchor_follow_what_the_last_step_kept():
    engines = Engines(SMALL | {"anchor": 2, "schedule": "lookback", "refresh": 3})
    configs, kept = [engines.setting.config] * 4, None
    for number in range(7):
        before = kept if number % 3 else None
        kept = check_step(engines, engines.step(), configs, before)
        engines.lengths += 1


def test_a_request_that_was_prefilled_again_starts_with_a_refresh():
    engines = Engines(SMALL | {"anchor": 2, "schedule": "lookback", "refresh": 0})
    configs = [engines.setting.config] * 4
    kept = check_step(engines, engines.step(), configs)
    engines.lengths += torch.tensor([1, 1, 2, 1], dtype=torch.int32)  # row 2 made a token more
    check_step(engines, engines.step(), configs, [kept[0], kept[1], None, kept[3]])


@pytest.mark.parametrize("wishes", ((None,) * 4, ("top_k:5", None, "off", None)), ids=str)
def test_drafted_tokens_of_a_row_are_decode_rows_of_their_own(wishes):
    """One call with several queries a row says what a row for each token says."""
    queries = 3
    engines = Engines(SMALL | {"anchor": 1}, wishes=wishes)
    table, lengths = engines.table, engines.lengths
    each = [row for row in engines.rows for _ in range(queries)]
    ends = (lengths[:, None] - torch.arange(queries).flip(0)).flatten().int()
    q = torch.randn(LAYERS, len(each), HEADS, DIM, generator=engines.random)
    outs, made = [], []
    for rows, tables, own, n in (
        (each, table.repeat_interleave(queries, 0), ends, 1),
        (engines.rows, table, lengths, queries),
    ):
        step, out = engines.steps.make(rows, tables, own, queries=n), torch.zeros_like(q)
        for i, layer in enumerate(engines.layers):
            layer.run(step, q[i], *engines.caches[i].chunk(2, dim=3), out[i])
        outs.append(out)
        made.append(step.selection)
    close(*outs)
    one, several = made
    assert torch.equal(one.counts, several.counts) and torch.equal(one.indices, several.indices)
    totals, sparse = engines.counters.totals(), (several.counts > 0).sum()
    assert sparse == queries * (2 if wishes[2] else 3)
    assert totals.sparse_rows == sum(totals.mass.counts) == 2 * sparse
    assert totals.kept == 2 * several.counts.sum()


def test_ranks_that_share_the_heads_select_what_one_rank_selects(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        engines = Engines(SMALL | {"anchor": 1})
        _, outs, selections = engines.step()
        again = Engines(SMALL | {"anchor": 1})
        for layer in again.layers:  # one rank that believes it holds half of the heads
            layer.heads = HeadGroup(dist.group.WORLD, HEADS)
            layer.heads.splits = lambda q: True
        _, others, shared = again.step()
        close(outs, others)
        assert torch.equal(selections[-1].indices, shared[-1].indices)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("tokens", (1, 3, 2000))
def test_new_keys_and_values_are_written_where_their_slots_say(dtype, tokens):
    cache = torch.zeros(150, 3, 16, 64, dtype=dtype)
    random = torch.Generator().manual_seed(tokens)
    kv = torch.randn(tokens, 3, 2, 32, generator=random).to(dtype)
    key, value = kv[:, :, 0], kv[:, :, 1]  # strided, as out of one projection
    slots = torch.randperm(150 * 16, generator=random)[:tokens]
    slots[tokens // 2 :: 5] = -1
    expected = cache.clone()
    real = slots >= 0
    block, offset = slots[real] // 16, slots[real] % 16
    expected[block, :, offset, :32], expected[block, :, offset, 32:] = key[real], value[real]
    write_pages(key, value, *cache.chunk(2, dim=3), slots)
    assert torch.equal(cache, expected)


def test_a_slot_beyond_the_pages_is_refused_before_anything_is_written():
    cache, kv = torch.zeros(2, 1, 4, 16), torch.ones(2, 1, 8)
    with pytest.raises(ValueError, match="slot 8 lies beyond the 8 slots"):
        write_pages(kv, kv, *cache.chunk(2, dim=3), torch.tensor([0, 8]))
    assert not cache.any()
