"""A static cache and torch.compile: one graph for prompts of any length, nothing breaks it."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import visionpulse as vp

PRUNED = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4))
PROMPTS = ([5, "i", 7], [9, "i", 12], [3, "i", 4])
LENGTH = 64


def compiled(backend):
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)
    config._compile_all_devices = True  # generate compiles by itself on a GPU only
    return {"compile_config": config}


def answers(vlm, prompts=PROMPTS, **options):
    text = vlm.model.config.get_text_config()
    cache = StaticCache(config=text, max_cache_len=LENGTH)
    outs = []
    for parts in prompts:
        cache.reset()
        outs.append(vlm.generate(vlm.inputs(parts), past_key_values=cache, **options))
    return outs


def eager(vlm, prompts=PROMPTS):
    return answers(vlm, prompts, disable_compile=True)


def assert_same(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", [pytest.param("llava", marks=pytest.mark.deep), "qwen3_vl"])
def test_three_prompts_share_one_graph(tiny, family):
    vlm = tiny(family, num_hidden_layers=3)
    with vp.patch(vlm.model, PRUNED) as session:
        expected = eager(vlm)
        plain = session.stats
        session.reset_stats()
        made_by_graph = answers(vlm, **compiled("aot_eager"))
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        assert_same(made_by_graph, expected)
        assert session.stats == plain  # counted inside the graph
        assert session.stats.steps == 21


@pytest.mark.deep  # a C++ compiler runs for a minute
def test_inductor_gives_the_same_tokens(tiny):
    vlm = tiny("llava", num_hidden_layers=2)
    with vp.patch(vlm.model, PRUNED):
        expected = eager(vlm)
        assert_same(answers(vlm, **compiled("inductor")), expected)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


def test_prompts_without_a_picture_share_the_graph(tiny):
    vlm = tiny("llava", num_hidden_layers=2)
    prompts = ([5, "i", 7], [14], [3, "i", 4])
    with vp.patch(vlm.model, PRUNED):
        expected = eager(vlm, prompts)
        assert_same(answers(vlm, prompts, **compiled("aot_eager")), expected)
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("refresh", [pytest.param(0, marks=pytest.mark.deep), 3])
def test_lookback_is_one_graph_too(tiny, refresh):
    vlm = tiny("llava", num_hidden_layers=3)
    config = PRUNED.updated(schedule="lookback", refresh=refresh)
    with vp.patch(vlm.model, config):
        expected = eager(vlm)
        assert_same(answers(vlm, **compiled("aot_eager")), expected)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


def test_unpatching_ends_with_the_graph(tiny):
    vlm = tiny("llava", num_hidden_layers=2)
    expected = answers(vlm, **compiled("aot_eager"))
    with vp.patch(vlm.model, PRUNED):
        pruned = answers(vlm, **compiled("aot_eager"))
        assert_same(pruned, eager(vlm))
    assert_same(answers(vlm, **compiled("aot_eager")), expected)


def crop(cache, tokens):
    """Drop tokens from the end; before transformers 5.24 a static layer cannot do it itself."""
    if hasattr(StaticLayer, "crop") or not isinstance(cache, StaticCache):
        cache.crop(-tokens)
        return
    for layer in cache.layers:
        layer.cumulative_length.sub_(tokens)
    cache.layers[0].visionpulse.crop(int(cache.get_seq_length()))


@pytest.mark.parametrize("schedule", ["paper", pytest.param("lookback", marks=pytest.mark.deep)])
def test_a_cache_cropped_within_its_picture_keeps_its_graph(tiny, schedule):
    vlm = tiny("llava", num_hidden_layers=3)
    text = vlm.model.config.get_text_config()
    decode = torch.compile(vlm.model.__call__, fullgraph=True, dynamic=False, backend="aot_eager")

    def logits(cache, step):
        outs = []
        vlm.model(**vlm.inputs(), past_key_values=cache, use_cache=True)
        for tokens in ((7, 8), (9, 7, 8)):
            for token in tokens:
                outs.append(step(input_ids=torch.tensor([[token]]), past_key_values=cache).logits)
            crop(cache, 17)  # then 7 of the 16 visual tokens are gone, and text takes their places
        return torch.cat(outs)

    def static():
        return StaticCache(config=text, max_cache_len=LENGTH)

    with vp.patch(vlm.model, PRUNED.updated(schedule=schedule)) as session, torch.no_grad():
        expected = logits(DynamicCache(config=text), vlm.model)
        stats = session.stats
        for step in (vlm.model, decode):
            session.reset_stats()
            torch.testing.assert_close(logits(static(), step), expected)
            assert session.stats.kept == stats.kept
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
