"""Lossless decoding: the tokens of the unpatched model, whatever the drafts are."""

import contextlib

import pytest
import torch
from drafts import DRAFTS
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import StoppingCriteria

import visionpulse as vp
from visionpulse.models import lossless, session_of

PROMPT = [9, "i", 6, "i", 3]


class Odd(LogitsProcessor):
    """Forbids every second token."""

    def __call__(self, ids, scores):
        scores[:, ids.shape[1] % 2 :: 2] = -torch.inf
        return scores


class StopAfter(StoppingCriteria):
    """Stops at a length that depends on the tokens."""

    def __call__(self, ids, scores, **_):
        stops = ids.shape[1] > 40 and int(ids[0, -1]) % 3 == 0
        return torch.full((len(ids),), stops)


class Heard:
    """A streamer."""

    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.flatten().tolist())

    def end(self):
        self.ended = True


SITUATIONS = {
    "greedy": {},
    "one token": {"tokens": 1},
    "seven tokens": {"tokens": 7},
    "sampled": {"do_sample": True, "top_k": 20},
    "sampled, hot": {"do_sample": True, "temperature": 3.0, "top_k": 0},
    "processors": {"logits_processor": LogitsProcessorList([Odd()])},
    "own stop": {"stopping_criteria": StoppingCriteriaList([StopAfter()])},
    "several ends": {"eos_token_id": [5, 17, 31, 40, 77, 99, 120]},
    "no repeat": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


def generated(vlm, options, prompt=PROMPT):
    torch.manual_seed(3)
    options = {"tokens": 24, "return_dict_in_generate": True, "output_scores": True} | options
    return vlm.generate(vlm.inputs(prompt), **options)


def assert_same(got, wanted):
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, theirs in zip(got.scores, wanted.scores, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3)
    cache, other = got.past_key_values, wanted.past_key_values
    length = int(other.get_seq_length())
    assert cache.get_seq_length() == length
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert a.shape == b.shape  # of a static cache, with slots behind its end
            assert torch.allclose(a[:, :, :length], b[:, :, :length], atol=1e-4)


@pytest.mark.filterwarnings("ignore:visionpulse prunes nothing")
@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("draft", (pytest.param("paper", marks=pytest.mark.deep), "blind"))
def test_tokens_scores_and_cache_are_the_unpatched_models(tiny, name, draft):
    vlm = tiny("llava")
    wanted = generated(vlm, SITUATIONS[name])
    with vp.patch(vlm.model, DRAFTS[draft], lossless=True, draft=4):
        assert_same(generated(vlm, SITUATIONS[name]), wanted)
        assert_same(generated(vlm, SITUATIONS[name]), wanted)
    assert "forward" not in vlm.model.__dict__
    assert_same(generated(vlm, SITUATIONS[name]), wanted)


MORE = [pytest.param(name, marks=pytest.mark.deep) for name in ("qwen2_vl", "qwen3_vl", "internvl")]


@pytest.mark.parametrize("family", ["llava", "gemma3", *MORE])
@pytest.mark.parametrize("draft", DRAFTS)
def test_on_families_and_drafts(tiny, family, draft):
    vlm = tiny(family)
    wanted = generated(vlm, {})
    for count in (1, 5, 15) if family == "llava" else (5,):
        with vp.patch(vlm.model, DRAFTS[draft], lossless=True, draft=count) as session:
            assert_same(generated(vlm, {}), wanted)
            stats = session.stats
            assert stats.drafted == stats.checks * count
            assert stats.checks + stats.accepted == 23  # the prefill gives the first of 24
            assert stats.rejected == stats.drafted - stats.accepted
            if draft == "all-of-it":
                assert stats.accepted >= 8  # a draft may say a token that generate() suppresses
            assert not stats.dense


EVERY_DRAFT = {  # of what a draft can know, so that keeping everything gives the dense token
    "greedy": {},
    "greedy, processors": {"repetition_penalty": 1.4, "min_new_tokens": 20},
    "sampled": {"do_sample": True, "top_k": 20, "top_p": 0.9},
    "sampled, hot": {"do_sample": True, "temperature": 3.0, "top_k": 0},
    "sampled, processors": {"do_sample": True, "repetition_penalty": 1.4, "min_p": 0.01},
}


@pytest.mark.parametrize("name", EVERY_DRAFT)
def test_a_draft_is_drawn_with_the_same_dice(tiny, name):
    """A draft that keeps everything says what the dense model will, so each is accepted."""
    vlm = tiny("llava")
    options = {"tokens": 26} | EVERY_DRAFT[name]  # the prefill's, and five rounds of five
    wanted = generated(vlm, options)
    with vp.patch(vlm.model, DRAFTS["all-of-it"], lossless=True, draft=4) as session:
        for _ in range(2):
            assert_same(generated(vlm, options), wanted)
        assert session.stats.rejected == 0
        assert session.stats.tokens_per_check == 5
    assert "_get_logits_processor" not in vlm.model.__dict__


@pytest.mark.parametrize("name", ("greedy", "sampled, hot"))
def test_adversarial_drafts_change_nothing(tiny, name):
    """A draft that says the least likely token is never accepted."""
    vlm = tiny("llava")
    wanted = generated(vlm, EVERY_DRAFT[name])
    with vp.patch(vlm.model, DRAFTS["paper"], lossless=True, draft=4) as session:
        ahead, plain = session._ahead, session._ahead.plain

        def flipped(**kwargs):
            out = plain(**kwargs)
            if session.patched.mode.drafts:
                out.logits = -100 * out.logits
            return out

        ahead.plain = flipped
        assert_same(generated(vlm, EVERY_DRAFT[name]), wanted)
        assert session.stats.accepted == 0 and session.stats.checks == 23
        ahead.plain = plain


def test_a_processor_with_a_state_is_asked_once_a_token(tiny):
    """A grammar, say, which a draft must not move on."""
    vlm = tiny("llava")

    class Counts(LogitsProcessor):
        def __init__(self):
            self.calls = []

        def __call__(self, ids, scores):
            self.calls.append(ids.shape[1])
            return scores

    heard = []
    for patched in (False, True):
        counts = Counts()
        if patched:
            vp.patch(vlm.model, DRAFTS["paper"], lossless=True, draft=4)
        generated(vlm, {"logits_processor": LogitsProcessorList([counts])})
        heard.append(counts.calls)
    assert heard[0] == heard[1] and len(heard[0]) == 24


def test_a_streamer_hears_one_token_at_a_time(tiny):
    vlm = tiny("llava")
    heard = []
    for patched in (False, True):
        streamer = Heard()
        if patched:
            vp.patch(vlm.model, DRAFTS["paper"], lossless=True, draft=4)
        vlm.generate(vlm.inputs(PROMPT), tokens=12, streamer=streamer)
        heard.append(streamer.got)
        assert streamer.ended
    assert heard[0] == heard[1]


def test_two_conversations_in_turn(tiny):
    """The second cache drops what was checked for the first."""
    vlm = tiny("llava")

    def run():
        caches = [DynamicCache(config=vlm.model.config.get_text_config()) for _ in range(2)]
        tokens = [[], []]
        with torch.no_grad():
            for cache, seed, said in zip(caches, (0, 1), tokens, strict=True):
                inputs = vlm.inputs(PROMPT, seed=seed)
                said.append(vlm.model(**inputs, past_key_values=cache).logits[:, -1].argmax(-1))
            for step in range(12):
                for cache, said in zip(caches, tokens, strict=True):
                    if step % 3 or said is tokens[0]:
                        ids = said[-1][:, None]
                        logits = vlm.model(input_ids=ids, past_key_values=cache).logits
                        said.append(logits[:, -1].argmax(-1))
        return torch.cat(tokens[0]), torch.cat(tokens[1])

    wanted = run()
    with vp.patch(vlm.model, DRAFTS["paper"], lossless=True, draft=4):
        got = run()
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_a_cache_that_its_owner_crops(tiny):
    vlm = tiny("llava")

    def run():
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        logits = []
        with torch.no_grad():
            vlm.model(**vlm.inputs(PROMPT), past_key_values=cache)
            for step, token in enumerate((7, 8, 9, 7, 8, 9, 10, 11)):
                out = vlm.model(input_ids=torch.tensor([[token]]), past_key_values=cache)
                logits.append(out.logits)
                if step in (2, 5):
                    cache.crop(-2)
        return torch.cat(logits), cache

    wanted, other = run()
    with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=4):
        got, cache = run()
    assert torch.allclose(got, wanted, atol=1e-4)
    assert cache.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize("call", range(1, 7))
def test_an_interrupted_round_leaves_the_last_accepted_token(tiny, call):
    """Wherever in the round: in a draft step or in the check."""
    vlm = tiny("llava")
    config = vlm.model.config.get_text_config()
    wanted = generated(vlm, {"tokens": 12}).sequences
    with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=4), torch.no_grad():
        cache = DynamicCache(config=config)
        vlm.model(**vlm.inputs(PROMPT), past_key_values=cache)
        length = cache.get_seq_length()
        calls = 0

        def stop(module, args):
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt

        handle = vlm.model.get_decoder().layers[4].register_forward_pre_hook(stop)
        token = wanted[:, length : length + 1]
        if call <= 5:
            with pytest.raises(KeyboardInterrupt):
                vlm.model(input_ids=token, past_key_values=cache)
            assert cache.get_seq_length() == length
            assert all(layer.keys.shape[2] == length for layer in cache.layers)
        handle.remove()
        assert cache.layers[0].visionpulse.steps == 0
        said = []
        for _ in range(10):
            logits = vlm.model(input_ids=token, past_key_values=cache).logits[:, -1]
            logits[:, [150, 151, 152, 153]] = -torch.inf
            token = logits.argmax(-1, keepdim=True)
            said.append(token)
    assert torch.equal(torch.cat(said, 1), wanted[:, length + 1 : length + 11])


def accept_one_too_many(monkeypatch):
    """What was asked for is not compared with what was drafted."""
    right = lossless.RunAhead._is_ahead

    def wrong(self, request):
        ahead = self._ahead
        drafted = ahead.end is not None and ahead.served < len(ahead.drafted)
        return right(self, request) or (drafted and request.length == ahead.end.length)

    monkeypatch.setattr(lossless.RunAhead, "_is_ahead", wrong)


def draw_dice(monkeypatch):
    right = lossless.RunAhead._round

    def wrong(self, request, plan):
        torch.rand(1)
        return right(self, request, plan)

    monkeypatch.setattr(lossless.RunAhead, "_round", wrong)


def draw_dice_in_a_draft(monkeypatch):
    """The draft's dice are not put back."""
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())


def roll_back_one_too_few(monkeypatch):
    right = lossless._end
    monkeypatch.setattr(lossless, "_end", lambda request, n: right(request, n + 1))


def serve_the_next_answer(monkeypatch):
    right = lossless.RunAhead._round

    def wrong(self, request, plan):
        out, ahead = right(self, request, plan), self._ahead
        ahead.logits = (*ahead.logits[1:], ahead.logits[-1])
        return out

    monkeypatch.setattr(lossless.RunAhead, "_round", wrong)


FAULTS = (
    accept_one_too_many,
    draw_dice,
    draw_dice_in_a_draft,
    roll_back_one_too_few,
    serve_the_next_answer,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_seen(tiny, monkeypatch, fault):
    vlm = tiny("llava")
    options = SITUATIONS["sampled, hot"] if "dice" in fault.__name__ else {}
    wanted = generated(vlm, options)
    fault(monkeypatch)
    with (
        vp.patch(vlm.model, DRAFTS["blind"], lossless=True, draft=4),
        pytest.raises((AssertionError, RuntimeError, IndexError)),
    ):
        assert_same(generated(vlm, options), wanted)


def test_the_next_draft_starts_from_the_selection_of_the_last_accepted_token(tiny):
    """A stale one would be exact all the same, but its drafts would be rejected."""
    vlm = tiny("llava")
    config = DRAFTS["lookback"]
    wanted = generated(vlm, {"tokens": 12}).sequences
    with vp.patch(vlm.model, config, lossless=True, draft=4) as session, torch.no_grad():
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        vlm.model(**vlm.inputs(PROMPT), past_key_values=cache)
        length = cache.get_seq_length()
        ahead, conversation = session._ahead._ahead, cache.layers[0].visionpulse
        for i in range(8):
            token = wanted[:, length + i : length + i + 1]
            vlm.model(input_ids=token, past_key_values=cache)
            assert conversation.steps == i + 1
            place = min(ahead.served, len(ahead.places) - 1)
            assert conversation.selection is ahead.places[place].selection


REFUSED = {
    "qwen3_5": "linear_attention",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_roll_back_is_refused(tiny, family):
    vlm = tiny(family)
    with pytest.raises(vp.UnsupportedModelError, match=rf"{REFUSED[family]}.*rolled back"):
        vp.patch(vlm.model, lossless=True, draft=4)
    assert session_of(vlm.model) is None


def test_bad_settings_are_refused(tiny):
    vlm = tiny("llava")
    for draft in (0, 16, True, 2.0):
        with pytest.raises(ValueError, match=r"draft must be .* a number of tokens from 1 to 15"):
            vp.patch(vlm.model, lossless=True, draft=draft)
    with pytest.raises(ValueError, match="record=True"):
        vp.patch(vlm.model, lossless=True, draft=4, record=True)
    with vp.patch(vlm.model, lossless=True, draft=3):
        with pytest.raises(ValueError, match="draft=3"):
            vp.patch(vlm.model)
        assert vp.patch(vlm.model, lossless=True, draft=3) is session_of(vlm.model)


def test_what_does_not_run_ahead_is_dense_and_said_once(tiny):
    vlm = tiny("llava")
    inputs = vlm.inputs([5, "i", 7], [5, "i", 7])
    wanted = vlm.generate(inputs)
    with vp.patch(vlm.model, DRAFTS["blind"], lossless=True, draft=4) as session:
        with pytest.warns(UserWarning, match="a batch of 2 rows"):
            assert torch.equal(vlm.generate(inputs), wanted)
        assert session.stats.dense == {"lossless, not run ahead": 7}
        assert session.stats.steps == session.stats.checks == 0
