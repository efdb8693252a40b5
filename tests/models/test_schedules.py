"""Lookback, per-layer and several anchors, against the oracle and under a changing cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

import visionpulse as vp

BASE = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4))
CONFIGS = {
    "several-anchors": (BASE.updated(anchor=(1, 3, 4)), (1, 3, 4)),
    "per-layer": (BASE.updated(schedule="per_layer"), tuple(range(6))),
    "lookback": (BASE.updated(schedule="lookback", refresh=0), (2,)),
    "lookback-refresh": (BASE.updated(schedule="lookback", refresh=3), (2,)),
}
PROMPTS = ([9, "i", 6, "i", 3], [4, "i", 5])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_tokens_are_those_of_the_oracle(tiny, oracle, family, name):
    config, anchors = CONFIGS[name]
    vlm = tiny(family)
    inputs = vlm.inputs(*PROMPTS)
    dense = vlm.generate(inputs, tokens=12)
    with vp.patch(vlm.model, config) as session:
        pruned = vlm.generate(inputs, tokens=12)
        assert session.anchors == anchors
        assert session.stats.steps == 11
        assert session.stats.rows == 11 * 2 * len(anchors)
    with oracle(vlm, config, *anchors) as truth:
        truth.visual = inputs["input_ids"] == 150
        expected = vlm.generate(inputs, tokens=12)
    assert torch.equal(pruned, expected)
    assert not torch.equal(pruned, dense)
    assert session.stats.kept.max == max(truth.counts)


@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_everything_changes_no_token(tiny, name):
    vlm = tiny("llava")
    inputs = vlm.inputs(*PROMPTS)

    def all_of_it():
        return torch.cat(
            [
                vlm.generate(inputs, tokens=12),
                vlm.generate(inputs, tokens=12, num_beams=2),
                vlm.generate(inputs, tokens=12, cache_implementation="static",
                              disable_compile=True),
            ]
        )  # fmt: skip

    expected = all_of_it()
    with vp.patch(vlm.model, CONFIGS[name][0].updated(ratio=(1.0, 1.0))):
        assert torch.equal(all_of_it(), expected)


def step(vlm, cache, tokens):
    ids = torch.tensor(tokens)[:, None]
    return vlm.model(input_ids=ids, past_key_values=cache).logits


@pytest.fixture
def looking_back(tiny):
    """A model that looks back, and a cache after a prefill and two decode steps."""
    vlm = tiny("llava")
    config = CONFIGS["lookback"][0]
    cache = DynamicCache(config=vlm.model.config.get_text_config())
    with vp.patch(vlm.model, config) as session, torch.no_grad():
        vlm.model(**vlm.inputs(*PROMPTS), past_key_values=cache, use_cache=True)
        step(vlm, cache, [7, 8])
        step(vlm, cache, [9, 7])
        yield vlm, cache, session


def conversation(cache):
    return cache.layers[0].visionpulse


def test_the_first_step_after_a_crop_is_dense(looking_back):
    vlm, cache, session = looking_back
    assert conversation(cache).steps == 2
    cache.crop(-1)
    assert conversation(cache).selection is None
    fresh = copy.deepcopy(cache)
    after = step(vlm, cache, [9, 7])
    session.update(schedule="paper")  # whose early layers are always dense
    assert torch.equal(step(vlm, fresh, [9, 7]), after)
    session.update(schedule="lookback")


def test_what_is_kept_moves_with_the_rows(looking_back):
    vlm, cache, _ = looking_back
    twin = copy.deepcopy(cache)
    kept = conversation(cache).selection
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(conversation(cache).selection.indices, kept.indices[[1, 0]])
    assert torch.equal(conversation(twin).selection.indices, kept.indices)
    swapped = step(vlm, cache, [5, 6])
    assert torch.allclose(swapped, step(vlm, twin, [6, 5])[[1, 0]], atol=1e-5)
    cache.batch_repeat_interleave(2)
    assert conversation(cache).selection.counts.shape == (4,)
    step(vlm, cache, [5, 5, 6, 6])


def test_an_update_forgets_what_was_kept(looking_back):
    vlm, cache, session = looking_back
    session.update(tau=0.4)
    twin = copy.deepcopy(cache)
    after = step(vlm, cache, [9, 7])  # kept under another setting: this step is dense
    session.update(schedule="paper", tau=0.4)
    assert torch.equal(step(vlm, twin, [9, 7]), after)


def test_a_new_turn_starts_dense(looking_back):
    vlm, cache, _ = looking_back
    vlm.model(input_ids=torch.tensor([[3, 4], [5, 6]]), past_key_values=cache)
    assert conversation(cache).steps == 0
    assert conversation(cache).selection is None


def test_prompt_lookup_with_lookback(tiny):
    vlm = tiny("llava")
    config = CONFIGS["lookback"][0].updated(ratio=(1.0, 1.0))
    inputs = vlm.inputs()
    expected = vlm.generate(inputs, tokens=20, prompt_lookup_num_tokens=3)
    with vp.patch(vlm.model, config):
        assert torch.equal(vlm.generate(inputs, tokens=20, prompt_lookup_num_tokens=3), expected)


def test_policies_that_draw_or_rank_run_between_the_stages(tiny):
    vlm = tiny("llava")
    inputs = vlm.inputs(*PROMPTS)
    drawn = []
    for _ in range(2):
        with vp.patch(vlm.model, BASE.updated(budget=vp.Random(3))) as session:
            drawn.append(vlm.generate(inputs))
            assert session.stats.kept.min < session.stats.kept.max
    assert torch.equal(*drawn)


def test_dense_model_keeps_the_models_attention_before_the_anchor(tiny):
    vlm = tiny("llava")
    inputs = vlm.inputs(*PROMPTS)
    with vp.patch(vlm.model, BASE.updated(dense="model")) as session:
        first = vlm.generate(inputs)
        assert [role.value for role in session.patched.layer_roles.on_refresh[:2]] == [
            "model",
            "model",
        ]
        session.update(dense="ours")
        assert torch.equal(vlm.generate(inputs), first)


def test_explain_names_the_condition_of_lookback(tiny):
    vlm = tiny("llava")
    assert "breaks some models" in str(vp.explain(vlm.model, CONFIGS["lookback"][0]))
    assert "breaks some models" not in str(vp.explain(vlm.model))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_the_dense_preset_keeps_every_output(tiny, name, recwarn):
    """Our dense kernels alone, in whatever layer has full attention."""
    vlm = tiny(name)
    inputs = vlm.inputs([5, "i", 7], [4, "i", 3])
    wanted = vlm.generate(inputs, return_dict_in_generate=True, output_scores=True)
    with vp.patch(vlm.model, "dense") as session:
        got = vlm.generate(inputs, return_dict_in_generate=True, output_scores=True)
        assert session.stats.dense == {"as asked": 7} and session.stats.steps == 0
        assert session.anchors == () and "anchor     none" in str(vp.explain(vlm.model))
        assert "dense" in vp.explain(vlm.model).roles
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, theirs in zip(got.scores, wanted.scores, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert not [w for w in recwarn if "visionpulse" in str(w.message)]
    with pytest.raises(ValueError, match="nothing to draft"):
        vp.patch(vlm.model, "dense", lossless=True)
