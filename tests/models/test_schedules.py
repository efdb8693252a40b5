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
    made = tiny(family)
    given = made.inputs(*PROMPTS)
    dense = made.generate(given, tokens=12)
    with vp.patch(made.model, config) as session:
        pruned = made.generate(given, tokens=12)
        assert session.anchors == anchors
        assert session.stats.steps == 11
        assert session.stats.rows == 11 * 2 * len(anchors)
    with oracle(made, config, *anchors) as truth:
        truth.visual = given["input_ids"] == 150
        expected = made.generate(given, tokens=12)
    assert torch.equal(pruned, expected)
    assert not torch.equal(pruned, dense)
    assert session.stats.kept.max == max(truth.counts)


@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_everything_changes_no_token(tiny, name):
    made = tiny("llava")
    given = made.inputs(*PROMPTS)

    def all_of_it():
        return torch.cat(
            [
                made.generate(given, tokens=12),
                made.generate(given, tokens=12, num_beams=2),
                made.generate(given, tokens=12, cache_implementation="static",
                              disable_compile=True),
            ]
        )  # fmt: skip

    expected = all_of_it()
    with vp.patch(made.model, CONFIGS[name][0].updated(ratio=(1.0, 1.0))):
        assert torch.equal(all_of_it(), expected)


def step(made, cache, tokens):
    ids = torch.tensor(tokens)[:, None]
    return made.model(input_ids=ids, past_key_values=cache).logits


@pytest.fixture
def looking_back(tiny):
    """A model that looks back, and a cache after a prefill and two decode steps."""
    made = tiny("llava")
    config = CONFIGS["lookback"][0]
    cache = DynamicCache(config=made.model.config.get_text_config())
    with vp.patch(made.model, config) as session, torch.no_grad():
        made.model(**made.inputs(*PROMPTS), past_key_values=cache, use_cache=True)
        step(made, cache, [7, 8])
        step(made, cache, [9, 7])
        yield made, cache, session


def conversation(cache):
    return cache.layers[0].visionpulse


def test_the_first_step_after_a_crop_is_dense(looking_back):
    made, cache, session = looking_back
    assert conversation(cache).steps == 2
    cache.crop(-1)
    assert conversation(cache).selection is None
    fresh = copy.deepcopy(cache)
    after = step(made, cache, [9, 7])
    session.update(schedule="paper")  # whose early layers are always dense
    assert torch.equal(step(made, fresh, [9, 7]), after)
    session.update(schedule="lookback")


def test_what_is_kept_moves_with_the_rows(looking_back):
    made, cache, _ = looking_back
    twin = copy.deepcopy(cache)
    kept = conversation(cache).selection
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(conversation(cache).selection.indices, kept.indices[[1, 0]])
    assert torch.equal(conversation(twin).selection.indices, kept.indices)
    swapped = step(made, cache, [5, 6])
    assert torch.allclose(swapped, step(made, twin, [6, 5])[[1, 0]], atol=1e-5)
    cache.batch_repeat_interleave(2)
    assert conversation(cache).selection.counts.shape == (4,)
    step(made, cache, [5, 5, 6, 6])


def test_an_update_forgets_what_was_kept(looking_back):
    made, cache, session = looking_back
    session.update(tau=0.4)
    twin = copy.deepcopy(cache)
    after = step(made, cache, [9, 7])  # kept under another setting: this step is dense
    session.update(schedule="paper", tau=0.4)
    assert torch.equal(step(made, twin, [9, 7]), after)


def test_a_new_turn_starts_dense(looking_back):
    made, cache, _ = looking_back
    made.model(input_ids=torch.tensor([[3, 4], [5, 6]]), past_key_values=cache)
    assert conversation(cache).steps == 0
    assert conversation(cache).selection is None


def test_prompt_lookup_with_lookback(tiny):
    made = tiny("llava")
    config = CONFIGS["lookback"][0].updated(ratio=(1.0, 1.0))
    given = made.inputs()
    expected = made.generate(given, tokens=20, prompt_lookup_num_tokens=3)
    with vp.patch(made.model, config):
        assert torch.equal(made.generate(given, tokens=20, prompt_lookup_num_tokens=3), expected)


def test_policies_that_draw_or_rank_run_between_the_stages(tiny):
    made = tiny("llava")
    given = made.inputs(*PROMPTS)
    drawn = []
    for _ in range(2):
        with vp.patch(made.model, BASE.updated(budget=vp.Random(3))) as session:
            drawn.append(made.generate(given))
            assert session.stats.kept.min < session.stats.kept.max
    assert torch.equal(*drawn)


def test_dense_model_keeps_the_models_attention_before_the_anchor(tiny):
    made = tiny("llava")
    given = made.inputs(*PROMPTS)
    with vp.patch(made.model, BASE.updated(dense="model")) as session:
        first = made.generate(given)
        assert [role.value for role in session.patched.layer_roles.on_refresh[:2]] == [
            "model",
            "model",
        ]
        session.update(dense="ours")
        assert torch.equal(made.generate(given), first)
