"""A session begins and ends without a trace, and says no where it must."""

import copy
import gc
import threading
import types

import pytest
import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface

import visionpulse as vp
from visionpulse.models import session_of
from visionpulse.models.families import FAMILIES, Family
from visionpulse.testing.draw import Draws

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


def test_flex_attention_is_refused(tiny):
    made = tiny("llava", num_hidden_layers=2)
    made.model.get_decoder().config._attn_implementation_internal = "flex_attention"
    with pytest.raises(vp.UnsupportedModelError, match="set_attn_implementation"):
        vp.patch(made.model)


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
    gc.collect()  # a dropped session of another test would leave the registry within this one
    registered = set(transformers.AttentionInterface._global_mapping)
    made = tiny("llava")
    other = transformers.AutoModelForImageTextToText.from_config(made.model.config).eval()
    Draws(9).refill(other, 0.02)
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
    assert set(transformers.AttentionInterface._global_mapping) == registered


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


def test_published_models_have_their_anchor(tiny):
    made = tiny("qwen3_vl", num_hidden_layers=24)
    assert vp.explain(made.model).anchors == (11,)
    made.model.config.name_or_path = "Qwen/Qwen3-VL-4B-Instruct"
    told = vp.explain(made.model)
    assert told.anchors == (17,)
    assert "published" in str(told)
    with vp.patch(made.model) as session:
        assert session.anchors == (17,)
        assert session.config == vp.PRESETS["10pct"]
    with vp.patch(made.model, anchor=9) as session:
        assert session.anchors == (9,)


def test_use_cache_false_is_dense(tiny):
    made = tiny("llava")
    expected = made.generate(made.inputs(), use_cache=False)
    with vp.patch(made.model, PRUNED) as session:
        assert torch.equal(made.generate(made.inputs(), use_cache=False), expected)
        assert session.stats.rows == 0
