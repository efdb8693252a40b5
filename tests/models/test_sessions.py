"""A session begins and ends without a trace, and says no where it must."""

import copy
import gc
import threading
import types
import warnings

import pytest
import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface

import visionpulse as vp
from visionpulse.models import session_of
from visionpulse.models.families import FAMILIES, Family

KEEP_ALL = vp.PulseConfig(ratio=(1.0, 1.0))
PRUNED = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4))


def footprint(model):
    """All that patching could leave behind: weights, configs, hooks, attributes, registries."""
    modules = dict(model.named_modules())
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "configs": [
            (name, m.config.to_dict(), m.config._attn_implementation)
            for name, m in modules.items()
            if hasattr(m, "config")
        ],
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "hooks": {
            name: [
                len(value)
                for key, value in sorted(vars(m).items())
                if key.endswith("_hooks") and hasattr(value, "__len__")
            ]
            for name, m in modules.items()
        },
        "classes": {name: (type(m), m.forward.__func__) for name, m in modules.items()},
        "attention": dict(transformers.AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
    }


def assert_same_footprint(model, before):
    after = footprint(model)
    state, old = after.pop("state"), before.pop("state")
    assert state.keys() == old.keys()
    assert all(torch.equal(state[name], old[name]) for name in old)
    assert after == before


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "qwen3_5"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_unpatch_leaves_the_model_as_it_was(tiny, family, base):
    made = tiny(family)
    made.model.set_attn_implementation(base)
    expected = made.generate(made.inputs())
    before = footprint(made.model)
    session = vp.patch(made.model, PRUNED, record=True)
    made.generate(made.inputs())
    assert session.stats.rows
    session.unpatch()
    assert_same_footprint(made.model, before)
    assert torch.equal(made.generate(made.inputs()), expected)
    made.model.set_attn_implementation("sdpa")


def test_only_the_decoder_is_switched(tiny):
    made = tiny("qwen2_5_vl")
    with vp.patch(made.model):
        assert made.model.get_decoder().config._attn_implementation == "visionpulse"
        assert made.model.config._attn_implementation == "sdpa"
        assert made.model.model.visual.config._attn_implementation == "sdpa"


def test_static_cache_kept_by_generate_is_given_back(tiny):
    made = tiny("llava", num_hidden_layers=4)
    with vp.patch(made.model, PRUNED):
        made.generate(made.inputs(), cache_implementation="static", disable_compile=True)
    kept = getattr(made.model, "_cache", None)
    if kept is not None:
        assert {type(layer).__name__ for layer in kept.layers} == {"StaticLayer"}
        assert not any("visionpulse" in vars(layer) for layer in kept.layers)


def test_same_config_gives_the_same_session_and_another_is_refused(tiny):
    made = tiny("llava")
    session = vp.patch(made.model, "5pct")
    assert vp.patch(made.model, "5pct") is session
    with pytest.raises(ValueError, match=r"session\.update"):
        vp.patch(made.model, "10pct")
    session.update(tau=0.4, ratio=(0.05, 0.10))
    assert vp.patch(made.model, "10pct") is session
    vp.unpatch(made.model)
    assert not session.is_active
    with pytest.warns(UserWarning, match="not patched"):
        vp.unpatch(made.model)
    with pytest.warns(UserWarning, match="has ended"):
        session.unpatch()


def test_errors_come_before_the_first_change(tiny):
    made = tiny("gemma3")
    before = footprint(made.model)
    with pytest.raises(ValueError, match="not a full-attention layer"):
        vp.patch(made.model, anchor=2)
    with pytest.raises(ValueError, match="no field"):
        vp.patch(made.model, anchr=3)
    with pytest.raises(ValueError, match="no preset"):
        vp.patch(made.model, "7pct")
    assert_same_footprint(made.model, before)
    session = vp.patch(made.model, anchor=3)
    with pytest.raises(ValueError, match="not a full-attention layer"):
        session.update(anchor=4)
    assert session.config.anchor == 3
    assert session.anchors == (3,)


def test_unsupported_models_are_refused_with_the_reason(tiny):
    text = transformers.AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=32,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(vp.UnsupportedModelError, match="names no visual token"):
        vp.patch(transformers.AutoModelForCausalLM.from_config(text))
    with pytest.raises(vp.UnsupportedModelError, match="expected a model of transformers"):
        vp.patch(torch.nn.Linear(2, 2))
    with pytest.raises(vp.UnsupportedModelError, match="expected a model of transformers"):
        vp.patch("llava")
    for kind, reason in (("mllama", "cross-attention"), ("florence2", "encoder")):
        fake = torch.nn.Module()
        fake.config = types.SimpleNamespace(model_type=kind)
        with pytest.raises(vp.UnsupportedModelError, match=reason):
            vp.patch(fake)
    remote = type("InternVLChatModel", (torch.nn.Module,), {})
    remote.__module__ = "transformers_modules.internvl"
    fake = remote()
    fake.config = types.SimpleNamespace(model_type="internvl_chat")
    with pytest.raises(vp.UnsupportedModelError, match="transformers port"):
        vp.patch(fake)


def test_a_family_row_can_name_other_ids(tiny, monkeypatch):
    made = tiny("llava")
    monkeypatch.setitem(FAMILIES, "llava", Family(ids=("bos_token_id",)))
    with pytest.raises(vp.UnsupportedModelError, match="bos_token_id"):
        vp.patch(made.model)


def test_paused_is_the_unpatched_model(tiny):
    made = tiny("llava")
    expected = made.generate(made.inputs())
    with vp.patch(made.model, PRUNED) as session:
        pruned = made.generate(made.inputs())
        with session.paused():
            cache = transformers.DynamicCache(config=made.model.config.get_text_config())
            assert torch.equal(made.generate(made.inputs(), past_key_values=cache), expected)
            assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
        assert torch.equal(made.generate(made.inputs()), pruned)
        assert not torch.equal(pruned, expected)


def test_update_changes_the_next_forward(tiny):
    made = tiny("llava")
    with vp.patch(made.model, KEEP_ALL) as session:
        made.generate(made.inputs())
        assert session.stats.kept.min == 16
        session.reset_stats()
        session.update(budget=vp.TopK(3))
        made.generate(made.inputs())
        assert (session.stats.kept.min, session.stats.kept.max) == (3, 3)
        session.reset_stats()
        session.update(budget=vp.TopP(0.6))
        made.generate(made.inputs())
        assert session.stats.rows == 7
        assert 1 <= session.stats.kept.min <= session.stats.kept.max <= 16
        assert session.update(anchor=4).anchors == (4,)


def test_two_models_that_share_a_config(tiny):
    made = tiny("llava")
    torch.manual_seed(9)
    other = transformers.AutoModelForImageTextToText.from_config(made.model.config).eval()
    given = made.inputs()
    alone = other.generate(**given, max_new_tokens=6, do_sample=False, suppress_tokens=[150])
    first = vp.patch(made.model, PRUNED)
    shared = other.get_decoder().config is made.model.get_decoder().config
    again = other.generate(**given, max_new_tokens=6, do_sample=False, suppress_tokens=[150])
    assert torch.equal(alone, again)
    second = vp.patch(other, KEEP_ALL)
    first.unpatch()
    assert second.is_active
    again = other.generate(**given, max_new_tokens=6, do_sample=False, suppress_tokens=[150])
    assert torch.equal(alone, again)
    assert second.stats.retention.min == 1.0
    second.unpatch()
    if shared:
        assert made.model.get_decoder().config._attn_implementation == "sdpa"
    assert "visionpulse" not in transformers.AttentionInterface._global_mapping


def test_a_patched_model_that_is_dropped_leaves_the_registries(tiny):
    made = tiny("llava", num_hidden_layers=3)
    session = vp.patch(made.model)
    config = made.model.get_decoder().config
    assert config._attn_implementation == "visionpulse"
    tiny.forget()
    del made, session
    gc.collect()
    assert config._attn_implementation == "sdpa"
    assert "visionpulse" not in transformers.AttentionInterface._global_mapping


def test_threads_on_one_model_do_not_meet(tiny):
    made = tiny("llava")
    prompts = [made.inputs([n, "i", 3], seed=n) for n in (3, 9, 14, 21)]
    with vp.patch(made.model, PRUNED):
        expected = [made.generate(given, tokens=12) for given in prompts]
        got = [None] * len(prompts)

        def work(i):
            got[i] = made.generate(prompts[i], tokens=12)

        for _ in range(2):
            threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_copied_cache_goes_its_own_way(tiny):
    made = tiny("qwen2_5_vl")
    cache = transformers.DynamicCache(config=made.model.config.get_text_config())
    with vp.patch(made.model, PRUNED, record=True) as session, torch.no_grad():
        given = made.inputs()
        made.model(**given, past_key_values=cache, use_cache=True)
        twin = copy.deepcopy(cache)
        token = torch.tensor([[7]])
        first = made.model(input_ids=token, past_key_values=cache).logits
        made.model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        second = made.model(input_ids=token, past_key_values=twin).logits
        assert torch.equal(first, second)
        assert [row.n_visual for row in session.trace] == [16] * 3


def test_a_second_turn_adds_its_picture(tiny):
    made = tiny("llava")
    cache = transformers.DynamicCache(config=made.model.config.get_text_config())
    with vp.patch(made.model, PRUNED, record=True) as session:
        answer = made.generate(made.inputs(), past_key_values=cache)
        more = made.inputs([3, "i", 2], seed=2)
        ids = torch.cat((answer, more.pop("input_ids")), dim=1)
        given = more | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made.generate(given, past_key_values=cache)
        assert {row.n_visual for row in session.trace} == {16, 32}


def test_a_generated_placeholder_is_text(tiny):
    made = tiny("llava")
    cache = transformers.DynamicCache(config=made.model.config.get_text_config())
    with vp.patch(made.model, KEEP_ALL, record=True) as session, torch.no_grad():
        made.model(**made.inputs(), past_key_values=cache, use_cache=True)
        for ids in ([[150]], [[3, 150, 4]], [[150]]):  # alone, and inside a text turn
            made.model(input_ids=torch.tensor(ids), past_key_values=cache)
        assert [row.n_visual for row in session.trace] == [16, 16]


def test_a_cache_made_by_the_decoder_is_followed(tiny):
    made = tiny("llava_next")
    with vp.patch(made.model, PRUNED, record=True) as session, torch.no_grad():
        cache = made.model(**made.inputs(), use_cache=True).past_key_values
        made.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert [row.n_visual for row in session.trace] == [36]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_inputs_embeds_are_recognised(tiny, family):
    made = tiny(family)
    given = made.inputs()
    ids = given.pop("input_ids")
    given["inputs_embeds"] = made.model.get_input_embeddings()(ids).detach()
    expected = made.generate(given)
    with vp.patch(made.model, KEEP_ALL) as session:
        assert torch.equal(made.generate(given), expected)
        assert session.stats.kept.min == 16


def test_merged_embeddings_need_a_mask(tiny):
    made = tiny("llava")
    given = made.inputs()
    ids = given["input_ids"]
    with torch.no_grad():
        embeds = made.model.get_input_embeddings()(ids)
        embeds[ids == 150] = torch.randn(16, 64)
    merged = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
    expected = made.generate(merged, num_beams=2)
    with vp.patch(made.model, KEEP_ALL) as session:
        with pytest.warns(UserWarning, match="set_visual_mask"):
            made.generate(merged)
        assert session.stats.rows == 0
        vp.set_visual_mask(made.model, ids == 150)
        assert torch.equal(made.generate(merged, num_beams=2), expected)
        assert session.stats.kept.min == 16
        session.set_visual_mask(ids[:, 1:] == 150)
        with pytest.raises(ValueError, match="one bool per token"):
            made.generate(merged)
        with pytest.raises(TypeError, match="bool tensor"):
            session.set_visual_mask(ids)
    with pytest.raises(ValueError, match="not patched"):
        vp.set_visual_mask(made.model, ids == 150)


def test_hidden_keys_in_the_middle_stay_on_the_models_path(tiny):
    made = tiny("llava")
    given = made.inputs([9, "i", 9])
    given["attention_mask"][0, 3:6] = 0
    expected = made.generate(given)
    with vp.patch(made.model, PRUNED) as session:
        assert torch.equal(made.generate(given), expected)
        assert session.stats.rows == 0


def test_training_and_gradients_take_the_models_path(tiny):
    made = tiny("llava")
    given = made.inputs()
    cache = transformers.DynamicCache(config=made.model.config.get_text_config())
    expected = made.model(**given, past_key_values=cache, use_cache=True)
    step = {"input_ids": torch.tensor([[7]])}
    reference = made.model(**step, past_key_values=cache).logits
    with vp.patch(made.model, PRUNED) as session:
        cache = transformers.DynamicCache(config=made.model.config.get_text_config())
        logits = made.model(**given, past_key_values=cache, use_cache=True).logits
        assert torch.equal(logits, expected.logits)
        out = made.model(**step, past_key_values=cache).logits
        assert torch.equal(out, reference)
        out.sum().backward()
        assert made.model.lm_head.weight.grad is not None
        made.model.zero_grad(set_to_none=True)
        assert session.stats.rows == 0
        made.model.train()
        made.model(**given, labels=given["input_ids"]).loss.backward()
        made.model.eval().zero_grad(set_to_none=True)


def test_a_patched_model_is_not_copied(tiny):
    made = tiny("llava")
    with vp.patch(made.model) as session:
        with pytest.raises(TypeError, match="unpatch it first"):
            copy.deepcopy(made.model)
        with pytest.raises(TypeError, match="unpatch it first"):
            session.__reduce__()
    copy.deepcopy(made.model)


def test_odd_caches_warn_once(tiny):
    made = tiny("llava")
    config = made.model.config.get_text_config()

    class QuantizedLikeLayer(transformers.cache_utils.DynamicLayer):
        pass

    with vp.patch(made.model, KEEP_ALL):
        for expect in (True, False):
            cache = transformers.DynamicCache(config=config)
            cache.layers[1] = QuantizedLikeLayer()
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                made.generate(made.inputs(), past_key_values=cache)
            assert any("quantised" in str(w.message) for w in seen) == expect


def test_image_tokens_without_an_image_warn(tiny):
    made = tiny("llava")
    given = made.inputs()
    del given["pixel_values"]
    with vp.patch(made.model), pytest.warns(UserWarning, match="prefill_chunk_size"):
        made.generate(given)


def test_failed_forwards_leave_nothing_behind(tiny):
    made = tiny("llava")
    with vp.patch(made.model, KEEP_ALL, record=True) as session, torch.no_grad():
        given = made.inputs()
        broken = dict(given, pixel_values=torch.randn(2, 3, 32, 32))
        with pytest.raises(ValueError):
            made.model(**broken)
        cache = transformers.DynamicCache(config=made.model.config.get_text_config())
        embeds = made.model.get_input_embeddings()(given["input_ids"])
        made.model.get_decoder()(inputs_embeds=embeds, past_key_values=cache)
        made.model.get_decoder()(inputs_embeds=embeds[:, :1], past_key_values=cache)
        assert len(session.trace) == 0  # what the failed forward found is not this prompt's


def test_explain_names_the_parts(tiny):
    made = tiny("gemma3")
    text = str(vp.explain(made.model))
    for part in ("Gemma3TextModel", "anchor     3", "150", "sdpa", "unpatched", "reference"):
        assert part in text
    with vp.patch(made.model, anchor=1):
        told = vp.explain(made.model)
    assert told.patched
    assert told.sparse_layers == (1, 3, 5)
    assert [i for i, role in enumerate(told.roles) if role == "model"] == [0, 2, 4]


def test_sinks_stay_dense_and_explain_says_so(tiny):
    made = tiny("llava", num_hidden_layers=3)
    for layer in made.model.get_decoder().layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    expected = made.generate(made.inputs())
    with vp.patch(made.model, PRUNED) as session:
        assert torch.equal(made.generate(made.inputs()), expected)
        assert session.stats.rows == 0
        assert "sinks" in str(vp.explain(made.model))


def test_wrapped_models_are_unwrapped(tiny):
    peft = pytest.importorskip("peft")
    made = tiny("llava", num_hidden_layers=4)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    wrapped = peft.get_peft_model(copy.deepcopy(made.model), config).eval()
    expected = made.generate(made.inputs())
    with vp.patch(wrapped, KEEP_ALL) as session:
        given = made.inputs()
        out = wrapped.generate(
            **given, max_new_tokens=8, do_sample=False, suppress_tokens=[150, 151, 152, 153]
        )
        assert torch.equal(out, expected)
        assert session.stats.retention.min == 1.0
    compiled = torch.compile(made.model, backend="eager")
    session = vp.patch(compiled, KEEP_ALL)
    assert session_of(made.model) is session
    session.unpatch()


def test_softcap_models_follow_eager(tiny, oracle):
    made = tiny("paligemma", model_type="gemma2", attn_logit_softcapping=2.0, sliding_window=16)
    made.model.set_attn_implementation("eager")
    expected = made.generate(made.inputs([4, "i", 5], [9, "i", 2]))
    with vp.patch(made.model, KEEP_ALL) as session:
        assert torch.equal(made.generate(made.inputs([4, "i", 5], [9, "i", 2])), expected)
        assert session.stats.retention.min == 1.0
