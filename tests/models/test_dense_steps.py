"""A dense step with a picture warns once, with the reason; a healthy model warns of nothing."""

import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

import visionpulse as vp
from visionpulse.models import stats
from visionpulse.models.notices import DenseReason
from visionpulse.models.visual_positions import VisualPositions

PRUNED = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4))


def new_cache(vlm):
    return DynamicCache(config=vlm.model.config.get_text_config())


def dense(session):
    return session.stats.dense


@pytest.fixture
def dense_warnings():
    """The texts of the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        yield lambda: [str(w.message) for w in seen if "prunes nothing" in str(w.message)]


def test_a_healthy_model_warns_of_nothing(tiny, dense_warnings):
    vlm = tiny("llava")
    with vp.patch(vlm.model, PRUNED) as session:
        assert "ran        nothing yet" in str(vp.explain(vlm.model))
        vlm.generate(vlm.inputs())
        assert session.stats.steps == 7
        assert dense(session) == {}
        assert "ran        7 sparse, 0 dense steps" in str(vp.explain(vlm.model))
    assert "ran" not in str(vp.explain(vlm.model)).split("backends")[0].split()
    assert dense_warnings() == []


@pytest.mark.parametrize("static", [False, True])
def test_a_text_only_prompt_warns_of_nothing_and_is_counted(tiny, dense_warnings, static):
    vlm = tiny("llava")
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with vp.patch(vlm.model, PRUNED) as session:
        vlm.generate(vlm.inputs([12]), **options)
        vlm.generate({"input_ids": torch.tensor([[5]])}, **options)  # a prompt of one token
        assert session.stats.steps == 0
        assert dense(session) == {"no picture": 14}
    assert dense_warnings() == []


def test_a_pause_is_counted_and_silent(tiny, dense_warnings):
    vlm = tiny("llava")
    with vp.patch(vlm.model, PRUNED) as session:
        with session.paused():
            vlm.generate(vlm.inputs())
        assert dense(session) == {"paused": 7}
        session.reset_stats()
        assert dense(session) == {}
    assert dense_warnings() == []


def assert_one(dense_warnings, text):
    (only,) = dense_warnings()
    assert text in only
    assert "explain" in only


def test_a_cache_of_an_unknown_kind(tiny, dense_warnings, monkeypatch):
    vlm = tiny("llava")
    monkeypatch.setattr("visionpulse.models.prefill.has_layers", lambda cache: False)
    with vp.patch(vlm.model, PRUNED) as session:
        vlm.generate(vlm.inputs([12]))
        assert dense_warnings() == []
        vlm.generate(vlm.inputs())
        vlm.generate(vlm.inputs())
        assert dense(session) == {"unknown cache": 21}
    assert_one(dense_warnings, "DynamicCache")


def test_a_cache_that_was_filled_elsewhere(tiny, dense_warnings):
    vlm = tiny("llava")
    with torch.no_grad():
        cache = new_cache(vlm)
        vlm.model(**vlm.inputs(), past_key_values=cache, use_cache=True)
        with vp.patch(vlm.model, PRUNED) as session:
            for _ in range(3):
                vlm.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
            assert dense(session) == {"cache filled elsewhere": 3}
    assert_one(dense_warnings, "before the model was patched")


def test_a_prompt_that_goes_past_the_base_model(tiny, dense_warnings):
    vlm = tiny("llava")
    decoder, cache = vlm.model.get_decoder(), new_cache(vlm)
    with vp.patch(vlm.model, PRUNED) as session, torch.no_grad():
        embeds = torch.randn(1, 12, 64)
        decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        assert dense_warnings() == []  # nothing is decoded yet
        for _ in range(2):
            decoder(inputs_embeds=embeds[:, :1], past_key_values=cache)
        assert dense(session) == {"prompt not seen": 2}
        assert_one(dense_warnings, "set_visual_mask")
        vp.set_visual_mask(vlm.model, torch.zeros(1, 12, dtype=torch.bool))
        cache = new_cache(vlm)
        decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        decoder(inputs_embeds=embeds[:, :1], past_key_values=cache)
        assert dense(session) == {"no picture": 1, "prompt not seen": 2}


def test_a_picture_whose_tokens_are_not_found(tiny, dense_warnings, monkeypatch):
    vlm = tiny("llava")
    with vp.patch(vlm.model, PRUNED) as session:
        monkeypatch.setattr(VisualPositions, "visual_mask", lambda *_: None)
        vlm.generate(vlm.inputs())
        assert dense(session) == {"visual tokens not found": 7}
    assert_one(dense_warnings, "150")


def test_a_static_cache_warns_at_the_prefill(tiny, dense_warnings, monkeypatch):
    vlm = tiny("llava")
    with vp.patch(vlm.model, PRUNED), torch.no_grad():
        monkeypatch.setattr(VisualPositions, "visual_mask", lambda *_: None)
        cache = StaticCache(config=vlm.model.config.get_text_config(), max_cache_len=64)
        vlm.model(**vlm.inputs(), past_key_values=cache, use_cache=True)
    assert_one(dense_warnings, "none of its tokens")


ENDINGS = {
    "prefill": lambda vlm, session: vlm.generate(vlm.inputs([12])),
    "stats": lambda vlm, session: session.stats,
    "explain": lambda vlm, session: vp.explain(vlm.model),
    "unpatch": lambda vlm, session: session.unpatch(),
}


# each compiles a step: two endings here, all in the deep proof
@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(name, marks=[pytest.mark.deep] if name in ("stats", "explain") else [])
        for name in ENDINGS
    ],
)
def test_a_compiled_step_holds_its_warning_back(tiny, dense_warnings, ending):
    vlm = tiny("llava", num_hidden_layers=2)
    torch._dynamo.reset()
    step = torch.compile(vlm.model.__call__, fullgraph=True, dynamic=False, backend="eager")
    config = vlm.model.config.get_text_config()
    with vp.patch(vlm.model, PRUNED) as session, torch.no_grad():
        vlm.model.get_decoder().config._attn_implementation_internal = "sdpa"
        cache = StaticCache(config=config, max_cache_len=64)
        vlm.model(**vlm.inputs(), past_key_values=cache, use_cache=True)
        for _ in range(3):
            step(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert dense_warnings() == []
        ENDINGS[ending](vlm, session)
        assert_one(dense_warnings, "sdpa")
        assert session.stats.dense["attention not called"] == 3
    assert_one(dense_warnings, "sdpa")
    torch._dynamo.reset()


def test_a_layer_that_bypasses_the_attention_interface(tiny, dense_warnings):
    vlm = tiny("llava", num_hidden_layers=3)
    with vp.patch(vlm.model, PRUNED) as session:
        vlm.model.get_decoder().config._attn_implementation_internal = "sdpa"
        vlm.generate(vlm.inputs())
        assert dense(session) == {"attention not called": 7}
        assert "0 sparse, 7 dense steps (7 attention not called)" in str(vp.explain(vlm.model))
    assert_one(dense_warnings, "sdpa")


def test_a_mask_with_holes(tiny, dense_warnings):
    vlm = tiny("llava")
    inputs = vlm.inputs([9, "i", 9])
    inputs["attention_mask"][0, 3:6] = 0
    with vp.patch(vlm.model, PRUNED) as session:
        vlm.generate(inputs)
        assert dense(session) == {"holes in the mask": 7}
    assert_one(dense_warnings, "pad on the left")


def test_a_mask_with_holes_over_pictures_that_were_not_found(tiny, dense_warnings, monkeypatch):
    vlm = tiny("llava")
    inputs = vlm.inputs([9, "i", 9])
    inputs["attention_mask"][0, 3:6] = 0
    with vp.patch(vlm.model, PRUNED) as session:
        monkeypatch.setattr(VisualPositions, "visual_mask", lambda *_: None)
        vlm.generate(inputs)
        assert dense(session) == {"holes in the mask": 7}
    assert_one(dense_warnings, "pad on the left")


def test_a_model_that_is_dense_by_design(tiny, dense_warnings):
    vlm = tiny("llava", num_hidden_layers=3)
    for layer in vlm.model.get_decoder().layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with vp.patch(vlm.model, PRUNED) as session:
        vlm.generate(vlm.inputs())
        assert dense(session) == {"dense by design": 7}
        vlm.generate(vlm.inputs([12]))
    assert_one(dense_warnings, "sinks")


def test_a_model_in_training_mode(tiny, dense_warnings):
    vlm = tiny("llava", num_hidden_layers=3)
    vlm.model.train()
    with vp.patch(vlm.model, PRUNED) as session:
        vlm.generate(vlm.inputs())
        assert dense(session) == {"training": 7}
    assert_one(dense_warnings, "model.eval()")


def test_what_the_attention_refuses(tiny, dense_warnings):
    vlm = tiny("llava")
    with vp.patch(vlm.model, PRUNED) as session:
        cache = new_cache(vlm)
        vlm.model(**vlm.inputs(), past_key_values=cache, use_cache=True)
        vlm.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert dense(session) == {"attention inputs": 1}
    assert_one(dense_warnings, "no_grad")


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_5", "qwen2_5_vl"])
@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_attentions_that_are_asked_for_are_those_of_the_model(
    tiny, dense_warnings, name, base, request
):
    """None is left out, and a base that returns none is named."""
    vlm = tiny(name)
    request.addfinalizer(lambda: vlm.model.set_attn_implementation("sdpa"))
    vlm.model.set_attn_implementation(base)

    def attentions():
        out = vlm.model.generate(
            **vlm.inputs(), do_sample=False, max_new_tokens=4, output_attentions=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return out.attentions

    expected = attentions()
    with vp.patch(vlm.model, PRUNED) as session:
        got = attentions()
        assert dense(session) == {"attention inputs": 3}
    assert [len(step) for step in got] == [len(step) for step in expected]
    assert bool(got[-1]) == (base == "eager")
    for now, then in zip(sum(got, ()), sum(expected, ()), strict=True):
        assert torch.equal(now, then)
    assert_one(dense_warnings, "only 'eager' returns them")


def test_a_config_that_asks_for_attentions(tiny, dense_warnings):
    vlm = tiny("llava", num_hidden_layers=3)  # a model of its own
    vlm.model.set_attn_implementation("eager")
    vlm.model.get_decoder().config.output_attentions = True
    with vp.patch(vlm.model, PRUNED) as session:
        vlm.generate(vlm.inputs())
        assert dense(session) == {"attention inputs": 7}
    assert_one(dense_warnings, "only 'eager' returns them")


def replace(vlm, attribute):
    """Put a copy with the same weights in place of a part, as a wrapper would."""
    home = vlm.model.model if attribute == "language_model" else vlm.model
    old = getattr(home, attribute)
    new = type(old)(old.config)
    new.load_state_dict(old.state_dict())
    setattr(home, attribute, new.eval())


@pytest.mark.parametrize("part", ["language_model", "model"])
def test_a_part_that_was_replaced_after_the_patch(tiny, dense_warnings, part):
    vlm = tiny("llava", num_hidden_layers=3)
    with vp.patch(vlm.model, PRUNED) as session:
        replace(vlm, part)
        vlm.generate(vlm.inputs([12]))
        assert dense_warnings() == []
        vlm.generate(vlm.inputs())
        assert dense(session) == {"decoder not called": 14}
    assert_one(dense_warnings, "LlamaModel")


def test_layers_that_are_called_without_their_decoder(tiny, dense_warnings):
    vlm = tiny("llava", num_hidden_layers=3)
    decoder, cache = vlm.model.get_decoder(), new_cache(vlm)

    def layers(hidden):
        places = torch.arange(hidden.shape[1])[None] + cache.get_seq_length()
        cos_sin = decoder.rotary_emb(hidden, places)
        for layer in decoder.layers:
            keys = next(n for n in ("cache", "past_key_values") if n in decoder_names(decoder))
            hidden = layer(hidden, position_embeddings=cos_sin, **{keys: cache})
        return hidden

    with vp.patch(vlm.model, PRUNED) as session, torch.no_grad():
        layers(torch.randn(1, 12, 64))
        layers(torch.randn(1, 1, 64))
        assert dense(session) == {"decoder not called": 1}
    assert_one(dense_warnings, "replaced")


def decoder_names(decoder):
    import inspect

    return inspect.signature(decoder.forward).parameters


def test_every_reason_but_silence_has_a_way_out():
    from visionpulse.models.notices import _TEXTS, SILENT

    assert set(_TEXTS) | set(SILENT) == set(DenseReason)
    assert str(stats.Stats(3, 0, dense={"training": 2})) == (
        "3 sparse decode steps, 2 dense: training"
    )
