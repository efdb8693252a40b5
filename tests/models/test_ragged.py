"""Lossless decoding of batches: each row's tokens are the unpatched model's."""

import pytest
import torch
from drafts import DRAFTS
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

import visionpulse as vp
from visionpulse.models.rounds import BatchRequest
from visionpulse.models.row_draws import BatchDice
from visionpulse.models.row_ends import RowEnds

RAGGED = ([9, "i", 6], [3, "i", 2], [20, "i", 6, "i", 3], [4, "i", 9])
SUPPRESSED = [150, 151, 152, 153]
OPTIONS = {
    "greedy": {},
    "one token": {"tokens": 1},
    "two tokens": {"tokens": 2},
    "sampled": {"do_sample": True, "top_k": 20},
    "sampled, hot": {"do_sample": True, "temperature": 3.0, "top_k": 0},
    "several ends": {"eos_token_id": [5, 17, 31, 40, 77, 99, 120, 121, 122, 30, 31, 32]},
    "sampled, several ends": {
        "eos_token_id": list(range(20, 40)), "do_sample": True, "temperature": 2.0,
    },
    "processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
    "sampled, processors": {"repetition_penalty": 1.4, "do_sample": True, "min_p": 0.01},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
}  # fmt: skip


def generated(call, vlm, options, rows=RAGGED):
    torch.manual_seed(3)
    options = {"tokens": 24, "return_dict_in_generate": True, "output_scores": True} | options
    options = {"do_sample": False, "max_new_tokens": options.pop("tokens")} | options
    out = call(**vlm.inputs(*rows), suppress_tokens=SUPPRESSED, **options)
    return out, torch.rand(1)  # and where the dice lie


def assert_same(got, wanted, width, ends=()):
    (got, dice), (wanted, other) = got, wanted
    assert torch.equal(got.sequences, wanted.sequences)
    assert torch.equal(dice, other)
    said = got.sequences[:, width:]
    cache, steps = got.past_key_values, said.shape[1]
    assert cache.get_seq_length() == wanted.past_key_values.get_seq_length() == width + steps - 1
    for row, tokens in enumerate(said.tolist()):
        count = next((i + 1 for i, token in enumerate(tokens) if token in ends), steps)
        for step in range(count):
            assert torch.allclose(got.scores[step][row], wanted.scores[step][row], atol=1e-3)
        for mine, theirs in zip(cache.layers, wanted.past_key_values.layers, strict=True):
            for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                end = width + count - 1
                assert torch.allclose(a[row, :, :end], b[row, :, :end], atol=1e-4)
                assert not a[row, :, end:].any()


def width_of(vlm, rows=RAGGED):
    return vlm.inputs(*rows)["input_ids"].shape[1]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("draft", (pytest.param("lookback", marks=pytest.mark.deep), "blind"))
def test_rows_say_what_the_unpatched_model_says(tiny, name, draft):
    vlm = tiny("llava")
    options = OPTIONS[name]
    wanted = generated(vlm.model.generate, vlm, options)
    with vp.patch(vlm.model, DRAFTS[draft], lossless=True, draft=4) as session:
        for _ in range(2):
            got = generated(session.generate, vlm, options)
            assert_same(got, wanted, width_of(vlm), options.get("eos_token_id", ()))
        assert not session.stats.dense
    assert not [name for name in vlm.model.__dict__ if name in ("forward", "generate")]


ROWS = {"one": ([9, "i", 6, "i", 3],), "four": RAGGED}
MORE = [pytest.param(name, marks=pytest.mark.deep) for name in ("internvl", "smolvlm", "glm4v")]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", *MORE])
def test_on_families(tiny, family, rows):
    vlm = tiny(family)
    wanted = generated(vlm.model.generate, vlm, {"tokens": 16}, ROWS[rows])
    with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=5) as session:
        got = generated(session.generate, vlm, {"tokens": 16}, ROWS[rows])
        assert_same(got, wanted, width_of(vlm, ROWS[rows]))
        assert session.stats.checks and not session.stats.dense


def test_with_eager_attention(tiny):
    vlm = tiny("llava")
    vlm.model.set_attn_implementation("eager")
    try:
        wanted = generated(vlm.model.generate, vlm, {})
        with vp.patch(vlm.model, DRAFTS["paper"], lossless=True, draft=4) as session:
            assert_same(generated(session.generate, vlm, {}), wanted, width_of(vlm))
    finally:
        vlm.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ("greedy", "sampled, hot", "sampled, processors"))
def test_a_draft_is_drawn_with_the_same_dice(tiny, name):
    """A draft that keeps everything says what the dense model will, so each is accepted."""
    vlm = tiny("llava")
    with vp.patch(vlm.model, DRAFTS["all-of-it"], lossless=True, draft=4) as session:
        generated(session.generate, vlm, {"tokens": 26} | OPTIONS[name])
        stats = session.stats
    assert (stats.checks, stats.drafted, stats.accepted) == (20, 80, 80)


def test_rows_accept_counts_of_their_own(tiny):
    vlm = tiny("llava")
    counts = []
    take = RowEnds.take

    def listen(self, said):
        counts.append(take(self, said))
        return counts[-1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(RowEnds, "take", listen)
        with vp.patch(vlm.model, DRAFTS["blind"], lossless=True, draft=4) as session:
            generated(session.generate, vlm, {})
    assert any(len(set(row)) > 1 for row in counts)


def test_a_row_without_a_picture_and_a_batch_without_one(tiny):
    vlm = tiny("llava")
    for rows in (([9, "i", 6], [12]), ([9], [4])):
        wanted = generated(vlm.model.generate, vlm, {}, rows)
        with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=4) as session:
            assert_same(generated(session.generate, vlm, {}, rows), wanted, width_of(vlm, rows))
            assert bool(session.stats.drafted) is (len(rows[0]) > 1)


class Heard:
    """A streamer of batches."""

    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_hears_each_step_of_all_rows_once(tiny):
    vlm = tiny("llava")
    options = OPTIONS["several ends"]
    heard = [Heard(), Heard()]
    generated(vlm.model.generate, vlm, options | {"streamer": heard[0]})
    with vp.patch(vlm.model, DRAFTS["blind"], lossless=True, draft=4) as session:
        generated(session.generate, vlm, options | {"streamer": heard[1]})
    assert heard[0].got == heard[1].got and heard[1].ended == 1


class Own(LogitsProcessor):
    """One that transformers does not know."""

    def __call__(self, ids, scores):
        return scores


DENSE = {
    "beam search": {"num_beams": 2},
    "a processor that may look at all rows, Own": {
        "logits_processor": LogitsProcessorList([Own()]), "do_sample": True,
    },
    "a batch on a static cache": {"cache_implementation": "static", "disable_compile": True},
}  # fmt: skip


@pytest.mark.parametrize("reason", DENSE)
def test_what_cannot_run_ahead_is_dense_and_said_once(tiny, reason, recwarn):
    vlm = tiny("llava")
    options = {"tokens": 8, "output_scores": False} | DENSE[reason]
    wanted, _ = generated(vlm.model.generate, vlm, options)
    with vp.patch(vlm.model, DRAFTS["blind"], lossless=True, draft=4) as session:
        for _ in range(2):
            got, _ = generated(session.generate, vlm, options)
            assert torch.equal(got.sequences, wanted.sequences)
        assert not session.stats.checks
    said = [str(w.message) for w in recwarn if "session.generate runs ahead" in str(w.message)]
    assert len(said) == 1 and reason in said[0]


def test_a_static_cache_of_the_callers_own_is_dense_in_a_batch(tiny, recwarn):
    """By session.generate and by generate(); explain counts the steps."""
    vlm = tiny("llava")
    config = vlm.model.config.get_text_config()
    wanted, _ = generated(vlm.model.generate, vlm, {"tokens": 8, "output_scores": False})
    with vp.patch(vlm.model, DRAFTS["paper"], lossless=True, draft=4) as session:
        for generate in (session.generate, vlm.model.generate):
            cache = StaticCache(config=config, max_cache_len=80)
            options = {"tokens": 8, "output_scores": False, "past_key_values": cache,
                       "disable_compile": True}  # fmt: skip
            got, _ = generated(generate, vlm, options)
            assert torch.equal(got.sequences, wanted.sequences)
        said = " ".join(str(warning.message) for warning in recwarn)
        assert "a batch on a StaticCache, in which no row can be rolled back" in said
        assert said.count("this is a batch of 4 rows") == 1
        explained = str(vp.explain(vlm.model))
        assert "for batches on a dynamic one in session.generate" in explained
        assert "dense steps (14 lossless, not run ahead" in explained


def test_without_lossless_it_is_refused(tiny):
    vlm = tiny("llava")
    with (
        vp.patch(vlm.model) as session,
        pytest.raises(ValueError, match=r"lossless=True; use model\.generate"),
    ):
        session.generate(**vlm.inputs(*RAGGED))


@pytest.mark.parametrize("call", (3, 5, 6, 12, 15))
def test_an_interrupted_round_leaves_the_last_step_that_all_rows_took(tiny, call):
    """The cache as dense decoding would have it there, and so the dice."""
    vlm = tiny("llava")
    config = vlm.model.config.get_text_config()
    options = OPTIONS["sampled, hot"] | {"output_scores": False, "return_dict_in_generate": False}
    wanted, _ = generated(vlm.model.generate, vlm, options)
    with vp.patch(vlm.model, DRAFTS["blind"], lossless=True, draft=4) as session:
        cache, calls = DynamicCache(config=config), 0

        def stop(module, args):
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt

        handle = vlm.model.get_decoder().layers[4].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            generated(session.generate, vlm, options | {"past_key_values": cache})
        handle.remove()
        dice, length = torch.rand(1), cache.get_seq_length()
        steps = length - width_of(vlm) + 1
        assert 1 <= steps < 24 and (call < 12) <= (steps == 1)
        assert not session.patched.mode.drafts and not session.patched.mode.checks
        assert type(cache.layers[0]).__name__ == "CarrierGrowingDynamicLayer"
        plain = DynamicCache(config=config)
        with session.paused():
            more = {"tokens": steps, "past_key_values": plain}
            said, other = generated(vlm.model.generate, vlm, options | more)
        assert torch.equal(dice, other) and torch.equal(said, wanted[:, : said.shape[1]])
        for mine, theirs in zip(cache.layers, plain.layers, strict=True):
            assert torch.allclose(mine.keys, theirs.keys, atol=1e-4)
            assert torch.allclose(mine.values, theirs.values, atol=1e-4)


def accept_one_too_many(monkeypatch):
    right = RowEnds.take
    monkeypatch.setattr(
        RowEnds, "take", lambda self, said: right(self, [row + row[-1:] for row in said])
    )


def draw_twice(monkeypatch):
    right = BatchDice.at

    def wrong(self, steps):
        torch.rand(1)
        return right(self, steps)

    monkeypatch.setattr(BatchDice, "at", wrong)


def write_one_slot_late(monkeypatch):
    right = BatchRequest.block

    def wrong(self, ids, first, size):
        named, slots = right(self, ids, first, size)
        return named, (slots + 1).clamp(max=size - 1)

    monkeypatch.setattr(BatchRequest, "block", wrong)


def leave_the_dice(monkeypatch):
    monkeypatch.setattr(BatchDice, "end", lambda self, steps: None)


def take_the_noise_of_the_first_row(monkeypatch):
    right = BatchDice.at
    monkeypatch.setattr(BatchDice, "at", lambda self, steps: right(self, steps[:1] * len(steps)))


FAULTS = (
    accept_one_too_many, draw_twice, write_one_slot_late, leave_the_dice,
    take_the_noise_of_the_first_row,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_seen(tiny, monkeypatch, fault):
    vlm = tiny("llava")
    options = {"do_sample": True, "temperature": 1.5, "tokens": 23}
    wanted = generated(vlm.model.generate, vlm, options)
    fault(monkeypatch)
    with (
        vp.patch(vlm.model, DRAFTS["paper"], lossless=True, draft=4) as session,
        pytest.raises((AssertionError, RuntimeError, IndexError, KeyError)),
    ):
        assert_same(generated(session.generate, vlm, options), wanted, width_of(vlm))


def test_the_next_draft_of_a_row_starts_from_its_last_accepted_token(tiny, monkeypatch):
    """A stale selection would be exact all the same, but its drafts would be rejected."""
    from visionpulse.models import ragged

    seen = []
    right = ragged._by_row

    def listen(selections, agreed):
        seen.append((selections, agreed, right(selections, agreed)))
        return seen[-1][2]

    monkeypatch.setattr(ragged, "_by_row", listen)
    vlm = tiny("llava")
    with vp.patch(vlm.model, DRAFTS["lookback"], lossless=True, draft=4) as session:
        generated(session.generate, vlm, {})
    assert len({int(n) for _, agreed, _ in seen for n in agreed}) > 2
    for selections, agreed, chosen in seen:
        for row, count in enumerate(agreed.tolist()):
            wanted = selections[min(count, 3)]
            assert torch.equal(chosen.indices[row], wanted.indices[row])
            assert torch.equal(chosen.counts[row], wanted.counts[row])
