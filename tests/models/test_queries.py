"""Forwards with several tokens behind a cache: as sparse as if the tokens had come one by one."""

import pytest
import torch
from transformers import DynamicCache

import visionpulse as vp

PRUNED = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4), queries="sparse")
PROMPTS = ([9, "i", 6, "i", 3], [4, "i", 5])
CONFIGS = {
    "paper": PRUNED,
    "several-anchors": PRUNED.updated(anchor=(1, 3, 4)),
    "per-layer": PRUNED.updated(schedule="per_layer"),
    "mean-logit": PRUNED.updated(mass="mean", score="logit", anchor_output="dense"),
    "models-attention": PRUNED.updated(dense="model"),
    "fixed": PRUNED.updated(budget=vp.Fixed(0.2)),
    "top-p": PRUNED.updated(budget=vp.TopP(0.5)),
}
TOKENS = torch.tensor([[7, 8, 9, 11, 12, 13], [21, 22, 23, 24, 25, 26]])


def prefilled(vlm, *prompts):
    cache = DynamicCache(config=vlm.model.config.get_text_config())
    with torch.no_grad():
        vlm.model(**vlm.inputs(*prompts), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def forwards(vlm, cache, tokens, widths):
    """The logits of tokens [B, n], in forwards of so many tokens each."""
    assert sum(widths) == tokens.shape[1]
    parts = tokens.split(widths, dim=1)
    return torch.cat(
        [vlm.model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts],
        dim=1,
    )


def rows_of(trace):
    return {(row.step, row.layer, row.row): (row.token, row.kept.tolist()) for row in trace}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("widths", ([6], [1, 3, 2]), ids=str)
def test_each_query_attends_as_one_by_one(tiny, name, widths):
    vlm = tiny("llava")
    found = []
    for each in ([1] * 6, widths):
        with vp.patch(vlm.model, CONFIGS[name], record=True) as session:
            cache = prefilled(vlm, *PROMPTS)
            logits = forwards(vlm, cache, TOKENS, each)
            found.append((logits, rows_of(session.trace), session.stats, cache))
    (one, kept, stats, cache), (several, kept_too, stats_too, cache_too) = found
    assert torch.allclose(several, one, atol=1e-4)
    assert kept_too == kept and len(kept) == stats.rows
    assert stats_too.steps == stats.steps == 6
    for layer, layer_too in zip(cache.layers, cache_too.layers, strict=True):
        assert torch.allclose(layer_too.keys, layer.keys, atol=1e-4)


def test_on_every_family(tiny, family):
    vlm = tiny(family)
    kinds = getattr(vlm.model.config.get_text_config(), "layer_types", None) or ()
    # a recurrence rounds otherwise over a chunk of tokens
    tolerance = 1e-3 if "linear_attention" in kinds else 1e-4
    with vp.patch(vlm.model, PRUNED) as session:
        one = forwards(vlm, prefilled(vlm, *PROMPTS), TOKENS, [1] * 6)
        alone = session.stats
        session.reset_stats()
        several = forwards(vlm, prefilled(vlm, *PROMPTS), TOKENS, [4, 2])
        assert session.stats.steps == alone.steps == 6
        assert session.stats.kept == alone.kept
    assert torch.allclose(several, one, atol=tolerance)
    dense = forwards(vlm, prefilled(vlm, *PROMPTS), TOKENS, [4, 2])
    assert not torch.allclose(several, dense, atol=1e-2)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_prompt_lookup_gives_the_tokens_of_plain_sparse_decoding(tiny, family):
    vlm = tiny(family)
    inputs = vlm.inputs()
    with vp.patch(vlm.model, PRUNED) as session:
        expected = vlm.generate(inputs, tokens=20)
        session.reset_stats()
        got = vlm.generate(inputs, tokens=20, prompt_lookup_num_tokens=3)
        assert session.stats.steps >= 19  # what was rejected is a step too
    assert torch.equal(got, expected)


def test_assisted_generation_gives_the_tokens_of_plain_sparse_decoding(tiny):
    vlm = tiny("llava")
    helper = tiny("llava", num_hidden_layers=2).model
    inputs = vlm.inputs()
    with vp.patch(vlm.model, PRUNED):
        expected = vlm.generate(inputs, tokens=16)
        assert torch.equal(vlm.generate(inputs, tokens=16, assistant_model=helper), expected)


def test_a_static_cache(tiny):
    vlm = tiny("llava")
    from transformers import StaticCache

    found = []
    for widths in ([1] * 6, [2, 4]):
        with vp.patch(vlm.model, PRUNED), torch.no_grad():
            cache = StaticCache(config=vlm.model.config.get_text_config(), max_cache_len=80)
            inputs = vlm.inputs(*PROMPTS)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
            vlm.model(**inputs, past_key_values=cache, use_cache=True)
            seen, logits = inputs["input_ids"].shape[1], []
            for part in TOKENS.split(widths, dim=1):
                seen += part.shape[1]
                out = vlm.model(
                    input_ids=part, past_key_values=cache, attention_mask=mask[:, :seen]
                )
                logits.append(out.logits)
            found.append(torch.cat(logits, 1))
    assert torch.allclose(*found, atol=1e-4)


def test_they_are_dense_unless_asked(tiny):
    vlm = tiny("llava")
    expected = forwards(vlm, prefilled(vlm, *PROMPTS), TOKENS, [6])
    with vp.patch(vlm.model, PRUNED.updated(queries="dense")) as session:
        assert torch.equal(forwards(vlm, prefilled(vlm, *PROMPTS), TOKENS, [6]), expected)
        assert session.stats.steps == 0


def test_a_new_picture_or_a_long_turn_is_a_prefill(tiny):
    vlm = tiny("llava")
    more = vlm.inputs([1, "i", 2], [1, "i", 2], seed=3)
    long = torch.arange(3, 20).expand(2, -1)
    assert long.shape[1] > 16
    with vp.patch(vlm.model, PRUNED) as session, torch.no_grad():
        for inputs in (
            {k: v for k, v in more.items() if k != "attention_mask"},
            {"input_ids": long},
        ):
            cache = prefilled(vlm, *PROMPTS)
            vlm.model(**inputs, past_key_values=cache, use_cache=True)
            assert session.stats.steps == 0


def test_a_mask_of_the_callers_own_is_not_taken_for_a_causal_one(tiny):
    """A tree of drafts hides some queries from others, which lengths cannot say."""
    vlm = tiny("llava")

    def tree():
        cache = prefilled(vlm, *PROMPTS)
        n = cache.get_seq_length()
        mask = torch.ones(2, 1, 6, n + 6, dtype=torch.bool)
        mask[..., n:] = torch.eye(6, dtype=torch.bool)
        with torch.no_grad():
            return vlm.model(
                input_ids=TOKENS, past_key_values=cache, attention_mask=mask, use_cache=True
            ).logits

    expected = tree()
    with vp.patch(vlm.model, PRUNED) as session:
        assert torch.equal(tree(), expected)
        assert session.stats.steps == 0


def test_lookback_is_refused():
    with pytest.raises(ValueError, match=r"'lookback'.*query before it.*schedule='paper'"):
        PRUNED.updated(schedule="lookback")
