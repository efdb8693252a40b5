"""Lossless decoding on a static cache: shapes stay, the unpatched model's tokens come."""

import pytest
import torch
from drafts import DRAFTS
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import visionpulse as vp
from visionpulse.models import static_ends

PROMPT = [9, "i", 6, "i", 3]
TOKENS = 24
CHOSEN = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "processors": {"repetition_penalty": 1.4, "min_new_tokens": 9},
    "several ends": {"eos_token_id": [5, 17, 31, 40, 77, 99, 120]},
}


def generated(vlm, options, prompt=PROMPT):
    torch.manual_seed(3)
    options = {"disable_compile": True, "cache_implementation": "static"} | options
    options = {"return_dict_in_generate": True, "output_scores": True} | options
    return vlm.generate(vlm.inputs(prompt), tokens=TOKENS, **options)


def assert_same(got, wanted):
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, theirs in zip(got.scores, wanted.scores, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3)
    cache, other = got.past_key_values, wanted.past_key_values
    length = int(other.get_seq_length())
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert int(mine.get_seq_length()) == int(theirs.get_seq_length()) == length
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert torch.allclose(a[:, :, :length], b[:, :, :length], atol=1e-4)


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("draft", ("paper", "blind"))
def test_tokens_scores_and_cache_are_the_unpatched_models(tiny, draft, chosen):
    vlm = tiny("llava")
    wanted = generated(vlm, CHOSEN[chosen])
    with vp.patch(vlm.model, DRAFTS[draft], lossless=True, draft=4) as session:
        for _ in range(2):
            assert_same(generated(vlm, CHOSEN[chosen]), wanted)
        assert session.stats.checks
    assert_same(generated(vlm, CHOSEN[chosen]), wanted)


@pytest.mark.deep
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl", "smolvlm"])
def test_on_families(tiny, family):
    vlm = tiny(family)
    wanted = generated(vlm, {})
    for config, count in ((DRAFTS["lookback"], 5), (DRAFTS["all-of-it"], 15)):
        with vp.patch(vlm.model, config, lossless=True, draft=count) as session:
            assert_same(generated(vlm, {}), wanted)
            assert session.stats.checks
            assert set(session.stats.dense) <= {"last slots of a static cache"}


def test_with_eager_attention(tiny):
    """Its masks are added to the logits."""
    vlm = tiny("llava")
    vlm.model.set_attn_implementation("eager")
    try:
        wanted = generated(vlm, {})
        with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=4) as session:
            assert_same(generated(vlm, {}), wanted)
            assert session.stats.checks
    finally:
        vlm.model.set_attn_implementation("sdpa")


def test_every_draft_that_keeps_everything_is_accepted(tiny):
    vlm = tiny("llava")
    with vp.patch(vlm.model, DRAFTS["all-of-it"], lossless=True, draft=4) as session:
        generated(vlm, {})
        stats = session.stats
    assert stats.rejected == 0 and not stats.dense
    assert stats.checks + stats.accepted == TOKENS - 1  # the prefill says the first


def test_the_last_rounds_draft_as_many_as_there_are_slots(tiny):
    vlm = tiny("llava")
    width = vlm.inputs(PROMPT)["input_ids"].shape[1]
    config = vlm.model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=width + TOKENS - 1)
    with vp.patch(vlm.model, DRAFTS["all-of-it"], lossless=True, draft=7) as session:
        generated(vlm, {"past_key_values": cache, "cache_implementation": None})
        assert session.stats.checks == 3  # rounds of 8, 8 and 7 tokens
    assert int(cache.get_seq_length()) == width + TOKENS - 1


def test_sliding_windows_are_dense_and_said_once(tiny):
    vlm = tiny("gemma3")
    wanted = generated(vlm, {})
    with (
        vp.patch(vlm.model, DRAFTS["paper"], lossless=True, draft=4) as session,
        pytest.warns(UserWarning, match="static sliding windows forget"),
    ):
        assert_same(generated(vlm, {}), wanted)
    assert not session.stats.checks


def called(vlm, tokens, act):
    """Logits of single tokens behind the prompt; `act` may change the cache after each."""
    text, logits = vlm.model.config.get_text_config(), []
    cache = StaticCache(config=text, max_cache_len=80)
    with torch.no_grad():
        vlm.model(**vlm.inputs(PROMPT), past_key_values=cache)
        for step, token in enumerate(tokens):
            logits.append(
                vlm.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
            )
            act(step, cache)
    return torch.cat(logits), cache


def drop(cache, tokens):
    """What a crop does; before transformers 5.24 a static layer has none."""
    for layer in cache.layers:
        layer.cumulative_length.sub_(tokens)


def test_a_cache_that_its_owner_crops(tiny):
    vlm = tiny("llava")

    def act(step, cache):
        if step in (2, 5):
            drop(cache, 2)

    tokens = (7, 8, 9, 7, 8, 9, 10, 11)
    wanted, other = called(vlm, tokens, act)
    with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=4) as session:
        got, cache = called(vlm, tokens, act)
        assert session.stats.checks
    assert torch.allclose(got, wanted, atol=1e-4)
    assert cache.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize("call", (2, 5))
def test_an_interrupted_round_leaves_the_last_accepted_token(tiny, call):
    """Wherever in the round: in a draft step or in the check."""
    vlm = tiny("llava")
    said = [7, 8, 9, 10, 11, 12]
    wanted, _ = called(vlm, said, lambda step, cache: None)
    calls, handles = 0, []

    def stop(module, args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    def act(step, cache):
        if step == 2:
            layer = vlm.model.get_decoder().layers[4]
            handles.append(layer.register_forward_pre_hook(stop))
            length = int(cache.get_seq_length())
            with pytest.raises(KeyboardInterrupt):
                vlm.model(input_ids=torch.tensor([[99]]), past_key_values=cache)
            handles.pop().remove()
            assert all(int(layer.cumulative_length) == length for layer in cache.layers)

    with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=4):
        got, _ = called(vlm, said, act)
    assert torch.allclose(got, wanted, atol=1e-4)


def test_a_rollback_that_is_off_by_one_is_seen(tiny, monkeypatch):
    vlm = tiny("llava")
    wanted = generated(vlm, {})
    right = static_ends.StaticEnd.move
    monkeypatch.setattr(static_ends.StaticEnd, "move", lambda end, n: right(end, n + 1))
    with (
        vp.patch(vlm.model, DRAFTS["blind"], lossless=True, draft=4),
        pytest.raises((AssertionError, RuntimeError, IndexError)),
    ):
        assert_same(generated(vlm, {}), wanted)


def compile_config():
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="aot_eager")
    config._compile_all_devices = True  # generate compiles by itself on a GPU only
    return config


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("family, draft", [
    ("llava", "lookback"), *(pytest.param(*each, marks=pytest.mark.deep) for each in (
        ("llava", "paper"), ("qwen3_vl", "lookback"), ("internvl", "paper"),
    )),
])  # fmt: skip
def test_a_draft_step_and_a_check_are_a_graph_each(tiny, graphs, family, draft):
    """Of one width: nothing breaks them, and no length or acceptance makes another."""
    vlm = tiny(family, num_hidden_layers=3)
    options = {"disable_compile": False, "compile_config": compile_config()}
    sampled = options | CHOSEN["sampled"]
    wanted, other = generated(vlm, {}), generated(vlm, CHOSEN["sampled"])
    with vp.patch(vlm.model, DRAFTS[draft], lossless=True, draft=4) as session:
        assert_same(generated(vlm, options), wanted)
        assert_same(generated(vlm, sampled), other)
        assert graphs() <= 3  # and dense steps, where a round does not fit the last slots
        assert not counters["graph_break"]
        stats = session.stats
        assert stats.checks and stats.steps == stats.drafted == 4 * stats.checks
        assert set(stats.dense) <= {"last slots of a static cache"}
    assert "get_compiled_call" not in vlm.model.__dict__


@pytest.mark.deep  # compiles for half a minute
def test_graphs_of_an_automatic_policy(tiny, graphs):
    vlm = tiny("llava", num_hidden_layers=4)
    wanted = generated(vlm, {})
    options = {"disable_compile": False, "compile_config": compile_config()}
    with vp.patch(vlm.model, "5pct", lossless=True) as session:
        for _ in range(3):
            assert_same(generated(vlm, options), wanted)
        assert session.stats.checks
        # of each way, a check, and a dense step that would not pay or has the last slots
        assert graphs() <= len(session._ahead.ways) + 3
        assert not counters["graph_break"]


def kept_after_each_token(vlm, session, call, tokens):
    """The selection that the next draft goes on from, by the token before it."""
    cache = StaticCache(config=vlm.model.config.get_text_config(), max_cache_len=90)
    kept, said = [], []
    with torch.no_grad():
        logits = vlm.model(**vlm.inputs(PROMPT), past_key_values=cache).logits[:, -1:]
        conversation = cache.layers[0].visionpulse
        for _ in range(tokens):
            token = logits[:, -1:].argmax(-1)
            said.append(int(token))
            logits = call(input_ids=token, past_key_values=cache).logits
            last = conversation.selection if call is vlm.model else conversation.lookback
            kept.append(last.indices[0, : int(last.counts)].tolist())
    return said, kept, session.stats.accepted


@pytest.mark.deep
def test_a_graphs_draft_starts_from_the_selection_of_the_last_accepted_token(tiny, graphs):
    """A stale one would be exact all the same, but its drafts would be rejected."""
    vlm = tiny("llava", num_hidden_layers=3)
    with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=4) as session:
        eager = kept_after_each_token(vlm, session, vlm.model, 16)
        session.reset_stats()
        call = session._ahead._compiled_call(compile_config())
        assert kept_after_each_token(vlm, session, call, 16) == eager
    assert eager[2] > 0 and graphs() == 2
