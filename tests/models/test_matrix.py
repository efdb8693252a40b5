"""Every family in every situation: keep everything and the tokens are the unpatched model's."""

import copy

import pytest
import torch
from transformers import DynamicCache

import visionpulse as vp

# what the package says about a prompt must be right: no warning in any situation
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

KEEP_ALL = vp.PulseConfig(ratio=(1.0, 1.0))
PRUNED = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4))


def greedy(tiny):
    return tiny.generate(tiny.inputs())


def sampling(tiny):
    torch.manual_seed(3)
    return tiny.generate(tiny.inputs(), do_sample=True, top_k=20)


def several_sequences(tiny):
    torch.manual_seed(3)
    return tiny.generate(tiny.inputs(), do_sample=True, top_k=20, num_return_sequences=3)


def beams(tiny):
    return tiny.generate(tiny.inputs(), num_beams=3)


def left_padded(tiny):
    return tiny.generate(tiny.inputs([9, "i", 6, "i", 3], [4, "i", 5]))


def row_without_picture(tiny):
    return tiny.generate(tiny.inputs([4, "i", 5], [12]))


def no_picture(tiny):
    return tiny.generate(tiny.inputs([12]))


def beams_of_a_batch(tiny):
    return tiny.generate(tiny.inputs([9, "i", 3], [4, "i", 5]), num_beams=2)


def static_cache(tiny):
    inputs = tiny.inputs([9, "i", 3], [4, "i", 5])
    return tiny.generate(inputs, cache_implementation="static", disable_compile=True)


def prompt_lookup(tiny):
    if not _can_crop(tiny):
        pytest.skip("transformers cannot crop this cache")
    return tiny.generate(tiny.inputs(), tokens=12, prompt_lookup_num_tokens=3)


def inference_mode(tiny):
    with torch.inference_mode():
        first = tiny.generate(tiny.inputs())
    return torch.cat((first, tiny.generate(tiny.inputs(seed=1))))


def second_turn(tiny):
    """A text turn, then one with a new picture, on the cache of the first and on its copies."""
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    first = tiny.inputs()
    answer = tiny.generate(first, past_key_values=cache)
    out = [answer]
    for parts in ([6], [3, "i", 4]):
        more = tiny.inputs(parts, seed=2)
        out.append(_continue(tiny, answer, more, copy.deepcopy(cache)))
    out.append(_continue(tiny, answer, tiny.inputs([3], seed=4), cache))
    return torch.cat(out, dim=1)


def _continue(tiny, answer, more, cache):
    ids = torch.cat((answer, more.pop("input_ids")), dim=1)
    inputs = more | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (answer.shape[1], 0))
    out = tiny.generate(inputs, past_key_values=cache)
    return out[:, ids.shape[1] :]


def _can_crop(tiny):
    kinds = getattr(tiny.model.config.get_text_config(), "layer_types", None) or ()
    return "linear_attention" not in kinds


SITUATIONS = (
    greedy,
    sampling,
    several_sequences,
    beams,
    left_padded,
    row_without_picture,
    no_picture,
    beams_of_a_batch,
    static_cache,
    prompt_lookup,
    inference_mode,
    second_turn,
)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
def test_keeping_everything_changes_no_token(tiny, family, situation):
    vlm = tiny(family)
    expected = situation(vlm)
    with vp.patch(vlm.model, KEEP_ALL) as session:
        assert torch.equal(situation(vlm), expected)
        if situation is not no_picture:
            assert session.stats.retention.min == 1.0
    assert torch.equal(situation(vlm), expected)


@pytest.mark.parametrize(
    "situation",
    (greedy, left_padded, beams_of_a_batch, static_cache, second_turn),
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_eager_models_too(tiny, family, situation):
    vlm = tiny(family)
    vlm.model.set_attn_implementation("eager")
    try:
        expected = situation(vlm)
        with vp.patch(vlm.model, KEEP_ALL) as session:
            assert torch.equal(situation(vlm), expected)
            assert session.stats.retention.min == 1.0
    finally:
        vlm.model.set_attn_implementation("sdpa")


def _prompts(situation):
    if situation is row_without_picture:
        return ([4, "i", 5], [12])
    if situation is left_padded:
        return ([9, "i", 6, "i", 3], [4, "i", 5])
    if situation in (beams_of_a_batch, static_cache):
        return ([9, "i", 3], [4, "i", 5])
    return ()


@pytest.mark.parametrize(
    "situation",
    (greedy, left_padded, row_without_picture, beams_of_a_batch, static_cache),
    ids=lambda f: f.__name__,
)
def test_pruned_tokens_are_those_of_the_oracle(tiny, family, situation, oracle):
    vlm = tiny(family)
    dense = situation(vlm)
    with vp.patch(vlm.model, PRUNED) as session:
        pruned = situation(vlm)
        anchor, stats = session.anchors[0], session.stats
    with oracle(vlm, PRUNED, anchor) as truth:
        truth.visual = vlm.inputs(*_prompts(situation))["input_ids"] == 150
        expected = situation(vlm)
    assert torch.equal(pruned, expected)
    counts = torch.tensor(truth.counts, dtype=torch.float64)
    assert stats.rows == len(counts)
    assert (stats.kept.min, stats.kept.max) == (counts.min(), counts.max())
    assert stats.kept.mean == pytest.approx(float(counts.mean()))
    assert stats.retention.max <= 0.4
    assert dense.shape == expected.shape
