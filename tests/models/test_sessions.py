"""A session begins and ends without a trace, and refuses what it cannot do."""

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
    vlm = tiny(family)
    vlm.model.set_attn_implementation(base)
    expected = vlm.generate(vlm.inputs())
    before = footprint(vlm.model)
    session = vp.patch(vlm.model, PRUNED, record=True)
    vlm.generate(vlm.inputs())
    assert session.stats.rows
    session.unpatch()
    assert_same_footprint(vlm.model, before)
    assert torch.equal(vlm.generate(vlm.inputs()), expected)
    vlm.model.set_attn_implementation("sdpa")


def test_only_the_decoder_is_switched(tiny):
    vlm = tiny("qwen2_5_vl")
    with vp.patch(vlm.model):
        assert vlm.model.get_decoder().config._attn_implementation == "visionpulse"
        assert vlm.model.config._attn_implementation == "sdpa"
        assert vlm.model.model.visual.config._attn_implementation == "sdpa"


def test_static_cache_kept_by_generate_is_given_back(tiny):
    vlm = tiny("llava", num_hidden_layers=4)
    with vp.patch(vlm.model, PRUNED):
        vlm.generate(vlm.inputs(), cache_implementation="static", disable_compile=True)
    kept = getattr(vlm.model, "_cache", None)
    if kept is not None:
        assert {type(layer).__name__ for layer in kept.layers} == {"StaticLayer"}
        assert not any("visionpulse" in vars(layer) for layer in kept.layers)


def test_same_config_gives_the_same_session_and_another_is_refused(tiny):
    vlm = tiny("llava")
    session = vp.patch(vlm.model, "5pct")
    assert vp.patch(vlm.model, "5pct") is session
    with pytest.raises(ValueError, match=r"session\.update"):
        vp.patch(vlm.model, "10pct")
    session.update(tau=0.4, ratio=(0.05, 0.10))
    assert vp.patch(vlm.model, "10pct") is session
    vp.unpatch(vlm.model)
    assert not session.is_active
    with pytest.warns(UserWarning, match="not patched"):
        vp.unpatch(vlm.model)
    with pytest.warns(UserWarning, match="has ended"):
        session.unpatch()


def test_errors_come_before_the_first_change(tiny):
    vlm = tiny("gemma3")
    before = footprint(vlm.model)
    with pytest.raises(ValueError, match="not a full-attention layer"):
        vp.patch(vlm.model, anchor=2)
    with pytest.raises(ValueError, match="no field"):
        vp.patch(vlm.model, anchr=3)
    with pytest.raises(ValueError, match="no preset"):
        vp.patch(vlm.model, "7pct")
    assert_same_footprint(vlm.model, before)
    session = vp.patch(vlm.model, anchor=3)
    with pytest.raises(ValueError, match="not a full-attention layer"):
        session.update(anchor=4)
    assert session.config.anchor == 3
    assert session.anchors == (3,)


def test_layers_that_cannot_be_pruned_are_named():
    """Window and way out, or the kinds of layers."""
    config = transformers.AutoConfig.for_model("idefics2")
    with torch.device("meta"):
        windowed = transformers.AutoModelForImageTextToText.from_config(config)
    with pytest.raises(vp.UnsupportedModelError, match=r"window of 4096; .*sliding_window = None"):
        vp.patch(windowed)
    config.text_config.sliding_window = None
    with torch.device("meta"):
        whole = transformers.AutoModelForImageTextToText.from_config(config)
    with vp.patch(whole) as session:
        assert len(session.anchors) == 1
    windowed.config.text_config.layer_types = ["linear_attention", "sliding_attention"] * 16
    with pytest.raises(vp.UnsupportedModelError, match="layers are linear_attention, sliding_"):
        vp.patch(windowed)


def test_continuous_batching_is_refused_at_its_entry(tiny, monkeypatch):
    vlm = tiny("llava")
    # the real one would leave its attention on the model
    begun = lambda model, **options: "begun"  # noqa: E731
    monkeypatch.setattr(type(vlm.model), "init_continuous_batching", begun)
    before = dict(vars(vlm.model))
    with vp.patch(vlm.model) as session:
        for begin in (
            lambda: vlm.model.generate_batch([[1, 2, 3]]), vlm.model.init_continuous_batching
        ):  # fmt: skip
            with pytest.raises(NotImplementedError, match=r"session\.paused"):
                begin()
        with session.paused():
            assert vlm.model.init_continuous_batching() == "begun"
    assert "init_continuous_batching" not in vars(vlm.model)
    assert set(vars(vlm.model)) == set(before)


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
    pipeline = types.SimpleNamespace(model=torch.nn.Linear(2, 2), task="image-text-to-text")
    with pytest.raises(vp.UnsupportedModelError, match=r"pass its \.model"):
        vp.patch(pipeline)
    for kind, reason in (
        ("mllama", "cross-attention"), ("blip", "cross-attention"), ("florence2", "encoder"),
        ("blip-2", "before the text as embeddings"), ("kosmos-2", "no token id"),
        ("pi0", "decodes actions"),
    ):  # fmt: skip
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
    vlm = tiny("llava", num_hidden_layers=2)
    vlm.model.get_decoder().config._attn_implementation_internal = "flex_attention"
    with pytest.raises(vp.UnsupportedModelError, match="set_attn_implementation"):
        vp.patch(vlm.model)


def test_a_family_row_can_name_other_ids(tiny, monkeypatch):
    vlm = tiny("llava")
    monkeypatch.setitem(FAMILIES, "llava", Family(ids=("bos_token_id",)))
    with pytest.raises(vp.UnsupportedModelError, match="bos_token_id"):
        vp.patch(vlm.model)


def test_paused_is_the_unpatched_model(tiny):
    vlm = tiny("llava")
    expected = vlm.generate(vlm.inputs())
    with vp.patch(vlm.model, PRUNED) as session:
        pruned = vlm.generate(vlm.inputs())
        with session.paused():
            cache = transformers.DynamicCache(config=vlm.model.config.get_text_config())
            assert torch.equal(vlm.generate(vlm.inputs(), past_key_values=cache), expected)
            assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
        assert torch.equal(vlm.generate(vlm.inputs()), pruned)
        assert not torch.equal(pruned, expected)


def test_update_changes_the_next_forward(tiny):
    vlm = tiny("llava")
    with vp.patch(vlm.model, KEEP_ALL) as session:
        vlm.generate(vlm.inputs())
        assert session.stats.kept.min == 16
        session.reset_stats()
        session.update(budget=vp.TopK(3))
        vlm.generate(vlm.inputs())
        assert (session.stats.kept.min, session.stats.kept.max) == (3, 3)
        session.reset_stats()
        session.update(budget=vp.TopP(0.6))
        vlm.generate(vlm.inputs())
        assert session.stats.rows == 7
        assert 1 <= session.stats.kept.min <= session.stats.kept.max <= 16
        assert session.update(anchor=4).anchors == (4,)


def test_two_models_that_share_a_config(tiny):
    gc.collect()  # a dropped session of another test would leave the registry within this one
    registered = set(transformers.AttentionInterface._global_mapping)
    vlm = tiny("llava")
    other = transformers.AutoModelForImageTextToText.from_config(vlm.model.config).eval()
    Draws(9).refill(other, 0.02)
    inputs = vlm.inputs()
    alone = other.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[150])
    first = vp.patch(vlm.model, PRUNED)
    shared = other.get_decoder().config is vlm.model.get_decoder().config
    again = other.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[150])
    assert torch.equal(alone, again)
    second = vp.patch(other, KEEP_ALL)
    first.unpatch()
    assert second.is_active
    again = other.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[150])
    assert torch.equal(alone, again)
    assert second.stats.retention.min == 1.0
    second.unpatch()
    if shared:
        assert vlm.model.get_decoder().config._attn_implementation == "sdpa"
    assert set(transformers.AttentionInterface._global_mapping) == registered


def test_a_patched_model_that_is_dropped_leaves_the_registries(tiny):
    vlm = tiny("llava", num_hidden_layers=3)
    session = vp.patch(vlm.model)
    config = vlm.model.get_decoder().config
    assert config._attn_implementation == "visionpulse"
    tiny.forget()
    del vlm, session
    gc.collect()
    assert config._attn_implementation == "sdpa"
    assert "visionpulse" not in transformers.AttentionInterface._global_mapping


def test_threads_on_one_model_do_not_meet(tiny):
    vlm = tiny("llava")
    prompts = [vlm.inputs([n, "i", 3], seed=n) for n in (3, 9, 14, 21)]
    with vp.patch(vlm.model, PRUNED):
        expected = [vlm.generate(inputs, tokens=12) for inputs in prompts]
        got = [None] * len(prompts)

        def work(i):
            got[i] = vlm.generate(prompts[i], tokens=12)

        for _ in range(2):
            threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_training_and_gradients_take_the_models_path(tiny):
    vlm = tiny("llava")
    inputs = vlm.inputs()
    cache = transformers.DynamicCache(config=vlm.model.config.get_text_config())
    expected = vlm.model(**inputs, past_key_values=cache, use_cache=True)
    step = {"input_ids": torch.tensor([[7]])}
    reference = vlm.model(**step, past_key_values=cache).logits
    with vp.patch(vlm.model, PRUNED) as session:
        cache = transformers.DynamicCache(config=vlm.model.config.get_text_config())
        logits = vlm.model(**inputs, past_key_values=cache, use_cache=True).logits
        assert torch.equal(logits, expected.logits)
        out = vlm.model(**step, past_key_values=cache).logits
        assert torch.equal(out, reference)
        out.sum().backward()
        assert vlm.model.lm_head.weight.grad is not None
        vlm.model.zero_grad(set_to_none=True)
        assert session.stats.rows == 0
        vlm.model.train()
        vlm.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        vlm.model.eval().zero_grad(set_to_none=True)


def test_a_patched_model_is_not_copied(tiny):
    vlm = tiny("llava")
    with vp.patch(vlm.model) as session:
        with pytest.raises(TypeError, match="unpatch it first"):
            copy.deepcopy(vlm.model)
        with pytest.raises(TypeError, match="unpatch it first"):
            session.__reduce__()
    copy.deepcopy(vlm.model)


def test_explain_names_the_parts(tiny):
    vlm = tiny("gemma3")
    text = str(vp.explain(vlm.model))
    for part in ("Gemma3TextModel", "anchor     3", "150", "sdpa", "unpatched", "reference"):
        assert part in text
    with vp.patch(vlm.model, anchor=1):
        explanation = vp.explain(vlm.model)
    assert explanation.patched
    assert explanation.sparse_layers == (1, 3, 5)
    assert [i for i, role in enumerate(explanation.roles) if role == "model"] == [0, 2, 4]


def test_the_decoder_of_gpt_oss_stays_dense_for_its_sinks_and_says_so(tiny):
    """As in a published InternVL."""
    kinds = ["sliding_attention", "full_attention"] * 3
    vlm = tiny("internvl", model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2,
               layer_types=kinds, sliding_window=16)  # fmt: skip
    expected = vlm.generate(vlm.inputs())
    with vp.patch(vlm.model, PRUNED) as session, pytest.warns(UserWarning, match="sinks") as said:
        for _ in range(2):
            assert torch.equal(vlm.generate(vlm.inputs()), expected)
        assert len(said) == 1 and session.stats.rows == 0
        explained = vp.explain(vlm.model)
    assert explained.anchors == () and "stays dense: its attention has sinks" in str(explained)


def test_latent_attention_is_refused_by_its_name(tiny):
    """DeepSeek's, as in kimi_k25: a key is wider than a value."""
    vlm = tiny("llava", num_hidden_layers=3)
    vlm.model.get_decoder().layers[1].self_attn.kv_lora_rank = 8
    with pytest.raises(vp.UnsupportedModelError, match="layers have latent attention"):
        vp.patch(vlm.model)
    assert vlm.model.get_decoder().config._attn_implementation != "visionpulse"


def test_wrapped_models_are_unwrapped(tiny):
    peft = pytest.importorskip("peft")
    vlm = tiny("llava", num_hidden_layers=4)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    wrapped = peft.get_peft_model(copy.deepcopy(vlm.model), config).eval()
    expected = vlm.generate(vlm.inputs())
    with vp.patch(wrapped, KEEP_ALL) as session:
        inputs = vlm.inputs()
        out = wrapped.generate(
            **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[150, 151, 152, 153]
        )
        assert torch.equal(out, expected)
        assert session.stats.retention.min == 1.0
    compiled = torch.compile(vlm.model, backend="eager")
    session = vp.patch(compiled, KEEP_ALL)
    assert session_of(vlm.model) is session
    session.unpatch()


def test_published_models_have_their_anchor(tiny):
    vlm = tiny("qwen3_vl", num_hidden_layers=24)
    assert vp.explain(vlm.model).anchors == (11,)
    vlm.model.config.name_or_path = "Qwen/Qwen3-VL-4B-Instruct"
    explanation = vp.explain(vlm.model)
    assert explanation.anchors == (17,)
    assert "published" in str(explanation)
    with vp.patch(vlm.model) as session:
        assert session.anchors == (17,)
        assert session.config == vp.PRESETS["10pct"]
    with vp.patch(vlm.model, anchor=9) as session:
        assert session.anchors == (9,)


def test_use_cache_false_is_dense(tiny):
    vlm = tiny("llava")
    expected = vlm.generate(vlm.inputs(), use_cache=False)
    with vp.patch(vlm.model, PRUNED) as session:
        assert torch.equal(vlm.generate(vlm.inputs(), use_cache=False), expected)
        assert session.stats.rows == 0
