"""What is watched in dense steps, against the attention matrices of one plain forward."""

import numpy as np
import pytest
import torch

from visionpulse.calibration.correlation import correlations, pearson, plot_correlation
from visionpulse.calibration.observe import observe
from visionpulse.testing.draw import Draws

transformers = pytest.importorskip("transformers")

IMAGE, LAYERS, CELLS, TOKENS = 50, 4, 36, 7
TAUS, LIMITS, RATIOS = (1.0, 0.3), (0.005, 0.02), (0.1, 0.5)


@pytest.fixture(scope="module")
def model():
    config = transformers.LlavaConfig(
        text_config=dict(
            model_type="llama", vocab_size=60, hidden_size=64, intermediate_size=96,
            num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=None,
        ),
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=8,
        ),
        image_token_index=IMAGE,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    draws = Draws(0)
    draws.refill(model, 0.02)
    # the default init hardly lets attention speak
    draws.refill(model.get_decoder(), 0.2, embedding=0.5)
    return model


def inputs_of(*texts, seed=0):
    draws = Draws(seed)
    lists = [[*draws.integers(3, 45, n).tolist(), *[IMAGE] * CELLS, 5, 6, 7] for n in texts]
    width = max(map(len, lists))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in lists])
    pixels = draws.normal(len(texts), 3, 48, 48)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def matrices(model, given, answer):
    """Head-wise attention of every layer over prompt and answer, by transformers: [L, H, n, n]."""
    ids = torch.cat([given["input_ids"], torch.tensor([answer])], 1)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=given["pixel_values"], output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return torch.stack(out.attentions)[:, 0]


def test_a_step_is_what_the_attention_matrix_says(model):
    given = inputs_of(4)
    seen = observe(
        model, given, max_new_tokens=TOKENS, taus=TAUS, thresholds=LIMITS, ratios=RATIOS,
        suppress_tokens=[IMAGE],
    )  # fmt: skip
    assert len(seen) == TOKENS - 1 and seen.layers == tuple(range(LAYERS))
    full = matrices(model, given, seen.answers[0])
    size = given["input_ids"].shape[1]
    visual = given["input_ids"][0] == IMAGE
    ever = torch.zeros(LAYERS, len(LIMITS), CELLS).bool()
    for step in range(TOKENS - 1):
        rows = full[:, :, size + step, :size][:, :, visual]  # [L, H, CELLS]
        share = rows.mean(1)
        torch.testing.assert_close(torch.from_numpy(seen.mass[step, :, 0]), rows.sum(2).amax(1))
        torch.testing.assert_close(torch.from_numpy(seen.mass_mean[step]), share.sum(1))
        for j, limit in enumerate(LIMITS):
            assert seen.active[step, :, j].tolist() == (share > limit).sum(1).tolist()
            ever[:, j] |= share > limit
        for a in range(LAYERS):
            for b in range(LAYERS):
                cosine = torch.cosine_similarity(share[a], share[b], 0)
                torch.testing.assert_close(torch.tensor(seen.similarity[step, a, b]), cosine)
                for r, ratio in enumerate(RATIOS):
                    best = share[a].topk(round(ratio * CELLS)).indices
                    held = share[b, best].sum() / share[b].sum()
                    torch.testing.assert_close(torch.tensor(seen.captured[step, a, b, r]), held)
    never = 1 - ever.float().mean(2)
    torch.testing.assert_close(torch.from_numpy(seen.never[0]), never)


def test_a_lower_temperature_sharpens_the_mass(model):
    given = inputs_of(4)
    seen = observe(model, given, max_new_tokens=3, taus=(1.0, 0.3, 0.01))
    out = matrices(model, given, seen.answers[0])
    size, visual = given["input_ids"].shape[1], given["input_ids"][0] == IMAGE
    z = out[:, :, size, : size + 1].log()  # logits up to a constant, which softmax drops
    for t, tau in enumerate((1.0, 0.3, 0.01)):
        share = (z / tau).softmax(-1)[..., :size][..., visual].sum(-1).amax(1)
        # the bound on the mass of spec section 7: logits here are below 10
        bound = 1e-4 + 16 * torch.finfo(torch.float32).eps * 10 / tau
        torch.testing.assert_close(torch.from_numpy(seen.mass[0, :, t]), share, rtol=bound, atol=0)


def test_a_padded_row_is_seen_as_alone(model):
    both = inputs_of(2, 9)
    seen = observe(model, both, max_new_tokens=4, suppress_tokens=[IMAGE])
    for row in range(2):
        padding = int((both["attention_mask"][row] == 0).sum())
        one = {k: both[k][row : row + 1, padding:] for k in ("input_ids", "attention_mask")}
        one["pixel_values"] = both["pixel_values"][row : row + 1]
        alone = observe(model, one, max_new_tokens=4, suppress_tokens=[IMAGE])
        here = seen.prompt == row
        assert alone.answers[0] == seen.answers[row]
        torch.testing.assert_close(*map(torch.from_numpy, (seen.mass[here], alone.mass)))
        np.testing.assert_array_equal(seen.active[here], alone.active)


def test_correlations_are_pearsons_r(model, tmp_path):
    seen = observe(
        model, [inputs_of(3, 5, 7, 4, 6, 8, 2, 9, seed=s) for s in range(2)],
        max_new_tokens=5, thresholds=LIMITS, suppress_tokens=[IMAGE],
    )  # fmt: skip
    rows = correlations(seen)
    assert [(r.layer, r.threshold) for r in rows] == [
        (layer, limit) for layer in range(LAYERS) for limit in LIMITS
    ]
    row = rows[3]
    x, y = seen.mass_mean[:, 1].astype(float), seen.active[:, 1, 1].astype(float)
    x, y = x - x.mean(), y - y.mean()
    assert row.pooled == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
    assert 0 <= row.never <= 1 and row.per_step == row.per_step
    pytest.importorskip("matplotlib")
    assert plot_correlation(seen, 2, tmp_path / "r.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="layer 9 was not observed; known: 0, 1, 2, 3"):
        plot_correlation(seen, 9, tmp_path / "r.png")


def test_pearson_of_a_constant_is_unknown():
    assert np.isnan(pearson([1, 1, 1], [1, 2, 3]))
    assert pearson([1, 2, 4], [2, 4, 8]) == pytest.approx(1.0)


def test_no_inputs_are_refused_for_what_they_are(model):
    with pytest.raises(ValueError, match="no inputs to observe"):
        observe(model, [])
