"""Which tokens of a prompt are visual, however the prompt comes in."""

import copy
import warnings

import pytest
import torch
import transformers

import visionpulse as vp
from visionpulse.testing.draw import Draws

KEEP_ALL = vp.PulseConfig(ratio=(1.0, 1.0))
PRUNED = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4))


def test_a_copied_cache_goes_its_own_way(tiny):
    vlm = tiny("qwen2_5_vl")
    cache = transformers.DynamicCache(config=vlm.model.config.get_text_config())
    with vp.patch(vlm.model, PRUNED, record=True) as session, torch.no_grad():
        inputs = vlm.inputs()
        vlm.model(**inputs, past_key_values=cache, use_cache=True)
        twin = copy.deepcopy(cache)
        token = torch.tensor([[7]])
        first = vlm.model(input_ids=token, past_key_values=cache).logits
        vlm.model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        second = vlm.model(input_ids=token, past_key_values=twin).logits
        assert torch.equal(first, second)
        assert [row.n_visual for row in session.trace] == [16] * 3


def test_a_second_turn_adds_its_picture(tiny):
    vlm = tiny("llava")
    cache = transformers.DynamicCache(config=vlm.model.config.get_text_config())
    with vp.patch(vlm.model, PRUNED, record=True) as session:
        answer = vlm.generate(vlm.inputs(), past_key_values=cache)
        more = vlm.inputs([3, "i", 2], seed=2)
        ids = torch.cat((answer, more.pop("input_ids")), dim=1)
        inputs = more | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        vlm.generate(inputs, past_key_values=cache)
        assert {row.n_visual for row in session.trace} == {16, 32}


def test_a_generated_placeholder_is_text(tiny):
    vlm = tiny("llava")
    cache = transformers.DynamicCache(config=vlm.model.config.get_text_config())
    with vp.patch(vlm.model, KEEP_ALL, record=True) as session, torch.no_grad():
        vlm.model(**vlm.inputs(), past_key_values=cache, use_cache=True)
        for ids in ([[150]], [[3, 150, 4]], [[150]]):  # alone, and inside a text turn
            vlm.model(input_ids=torch.tensor(ids), past_key_values=cache)
        assert [row.n_visual for row in session.trace] == [16, 16]


def test_a_cache_made_by_the_decoder_is_followed(tiny):
    vlm = tiny("llava_next")
    with vp.patch(vlm.model, PRUNED, record=True) as session, torch.no_grad():
        cache = vlm.model(**vlm.inputs(), use_cache=True).past_key_values
        vlm.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert [row.n_visual for row in session.trace] == [36]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_inputs_embeds_are_recognised(tiny, family):
    vlm = tiny(family)
    inputs = vlm.inputs()
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = vlm.model.get_input_embeddings()(ids).detach()
    expected = vlm.generate(inputs)
    with vp.patch(vlm.model, KEEP_ALL) as session:
        assert torch.equal(vlm.generate(inputs), expected)
        assert session.stats.kept.min == 16


def test_merged_embeddings_need_a_mask(tiny):
    vlm = tiny("llava")
    inputs = vlm.inputs()
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeds = vlm.model.get_input_embeddings()(ids)
        embeds[ids == 150] = Draws(0).normal(16, 64)
    merged = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
    expected = vlm.generate(merged, num_beams=2)
    with vp.patch(vlm.model, KEEP_ALL) as session:
        with pytest.warns(UserWarning, match="set_visual_mask"):
            vlm.generate(merged)
        assert session.stats.rows == 0
        vp.set_visual_mask(vlm.model, ids == 150)
        assert torch.equal(vlm.generate(merged, num_beams=2), expected)
        assert session.stats.kept.min == 16
        session.set_visual_mask(ids[:, 1:] == 150)
        with pytest.raises(ValueError, match="one bool per token"):
            vlm.generate(merged)
        with pytest.raises(TypeError, match="bool tensor"):
            session.set_visual_mask(ids)
    with pytest.raises(ValueError, match="not patched"):
        vp.set_visual_mask(vlm.model, ids == 150)


def test_hidden_keys_in_the_middle_stay_on_the_models_path(tiny):
    vlm = tiny("llava")
    inputs = vlm.inputs([9, "i", 9])
    inputs["attention_mask"][0, 3:6] = 0
    expected = vlm.generate(inputs)
    with vp.patch(vlm.model, PRUNED) as session:
        assert torch.equal(vlm.generate(inputs), expected)
        assert session.stats.rows == 0


def test_odd_caches_warn_once(tiny):
    vlm = tiny("llava")
    config = vlm.model.config.get_text_config()

    class QuantizedLikeLayer(transformers.cache_utils.DynamicLayer):
        pass

    with vp.patch(vlm.model, KEEP_ALL):
        for expect in (True, False):
            cache = transformers.DynamicCache(config=config)
            cache.layers[1] = QuantizedLikeLayer()
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                vlm.generate(vlm.inputs(), past_key_values=cache)
            assert any("quantised" in str(w.message) for w in seen) == expect


def test_image_tokens_without_an_image_warn(tiny):
    vlm = tiny("llava")
    inputs = vlm.inputs()
    del inputs["pixel_values"]
    with vp.patch(vlm.model), pytest.warns(UserWarning, match="prefill_chunk_size"):
        vlm.generate(inputs)


def test_failed_forwards_leave_nothing_behind(tiny):
    vlm = tiny("llava")
    with vp.patch(vlm.model, KEEP_ALL, record=True) as session, torch.no_grad():
        inputs = vlm.inputs()
        broken = dict(inputs, pixel_values=Draws(0).normal(2, 3, 32, 32))
        with pytest.raises(ValueError):
            vlm.model(**broken)
        cache = transformers.DynamicCache(config=vlm.model.config.get_text_config())
        embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
        vlm.model.get_decoder()(inputs_embeds=embeds, past_key_values=cache)
        vlm.model.get_decoder()(inputs_embeds=embeds[:, :1], past_key_values=cache)
        assert len(session.trace) == 0  # what the failed forward found is not this prompt's


def test_softcap_models_follow_eager(tiny, oracle):
    vlm = tiny("paligemma", model_type="gemma2", attn_logit_softcapping=2.0, sliding_window=16)
    vlm.model.set_attn_implementation("eager")
    expected = vlm.generate(vlm.inputs([4, "i", 5], [9, "i", 2]))
    with vp.patch(vlm.model, KEEP_ALL) as session:
        assert torch.equal(vlm.generate(vlm.inputs([4, "i", 5], [9, "i", 2])), expected)
        assert session.stats.retention.min == 1.0
