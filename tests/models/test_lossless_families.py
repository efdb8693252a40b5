"""Lossless decoding on every family that can roll back: the tokens of the unpatched model."""

import pytest
import torch

import visionpulse as vp

pytestmark = [pytest.mark.deep, pytest.mark.filterwarnings("ignore")]

LOOKBACK = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4), schedule="lookback", refresh=0)
RECURRENT = {"qwen3_5"}
SUPPRESSED = [150, 151, 152, 153]
CHOSEN = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 0},
}
ONE = ([9, "i", 6, "i", 3],)
FOUR = ([9, "i", 6], [3, "i", 2], [20, "i", 6, "i", 3], [4, "i", 9])
TOKENS = 20


def generated(call, inputs, options):
    torch.manual_seed(3)
    options = {"max_new_tokens": TOKENS, "suppress_tokens": SUPPRESSED} | options
    return call(**inputs, **options)


@pytest.mark.parametrize("rows", (ONE, FOUR), ids=("one", "four"))
@pytest.mark.parametrize("chosen", CHOSEN)
def test_a_family_says_what_its_unpatched_model_says(tiny, family, chosen, rows):
    vlm = tiny(family)
    if family in RECURRENT:
        with pytest.raises(vp.UnsupportedModelError, match="rolled back"):
            vp.patch(vlm.model, lossless=True)
        return
    inputs = vlm.inputs(*rows)
    wanted = generated(vlm.model.generate, inputs, CHOSEN[chosen])
    with vp.patch(vlm.model, LOOKBACK, lossless=True, draft=4) as session:
        call = vlm.model.generate if len(rows) == 1 else session.generate
        assert torch.equal(generated(call, inputs, CHOSEN[chosen]), wanted)
        stats = session.stats
    assert stats.drafted and not stats.dense
    assert stats.checks + stats.accepted == len(rows) * (TOKENS - 1)  # the prefill says the first


def logits_behind(vlm, inputs, said, count):
    """Dense logits [1, n, vocabulary] for each of the said tokens [1, n], fed `count` at a time."""
    with torch.no_grad():
        out = vlm.model(**inputs, use_cache=True)
        cache, found = out.past_key_values, [out.logits[:, -1:]]
        mask = inputs["attention_mask"]
        width = mask.shape[1]
        deltas = getattr(vlm.model.model, "rope_deltas", None)  # of positions with three parts
        for begin in range(0, said.shape[1] - 1, count):
            ids = said[:, begin : min(begin + count, said.shape[1] - 1)]
            mask = torch.ones(1, width + begin + ids.shape[1], dtype=mask.dtype)
            named = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
            if deltas is not None:
                places = torch.arange(width + begin, mask.shape[1]) + deltas  # [1, count]
                named["position_ids"] = places.expand(3, -1, -1)
            found.append(vlm.model(**named).logits)
    logits = torch.cat(found, 1).float()
    logits[..., SUPPRESSED] = -torch.inf
    return logits


def test_in_bf16_every_token_is_the_dense_models_first_or_ties_with_it(tiny, family):
    """Teacher-forced: the said tokens, fed one by one to the unpatched model."""
    if family in RECURRENT:
        return
    dtype, vlm = torch.bfloat16, tiny(family)
    weights = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    vlm.model.to(dtype)
    try:
        inputs = vlm.inputs(*ONE)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with vp.patch(vlm.model, LOOKBACK, lossless=True, draft=4) as session:
            out = generated(vlm.model.generate, inputs, CHOSEN["greedy"])
            assert session.stats.drafted
        said = out[:, inputs["input_ids"].shape[1] :]
        dense = logits_behind(vlm, inputs, said, 1)
        several = logits_behind(vlm, inputs, said, 5)
        finite = torch.isfinite(dense)
        apart = (dense - several)[finite].abs().max()  # by how many tokens a forward has
        ulp = torch.finfo(dtype).eps * dense[finite].abs().max()  # by another order of sums
        bound = 2 * (apart + ulp)
        behind = dense.amax(-1) - dense.gather(-1, said[..., None])[..., 0]  # [1, n]
        assert behind.max() <= bound, (behind, bound)
        assert (behind == 0).float().mean() > 0.8
    finally:
        vlm.model.to(torch.float32).load_state_dict(weights)  # other tests have it too
