"""The baselines against their definitions, run on a tiny random model of transformers."""

import methods
import pytest
import torch
import torch.nn.functional as F

import visionpulse as vp
from visionpulse.testing.draw import Draws

transformers = pytest.importorskip("transformers")

IMAGE, PAD, LAYERS, CELLS = 50, 0, 5, 36
SUPPRESSED = [IMAGE, 51, 52, 53]


@pytest.fixture(scope="module")
def model():
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=PAD,
            bos_token_id=1, eos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]),
        ),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4,
            temporal_patch_size=1, spatial_merge_size=2, out_hidden_size=64,
            num_position_embeddings=64, deepstack_visual_indexes=[0],
        ),
        image_token_id=IMAGE, video_token_id=51, vision_start_token_id=52,
        vision_end_token_id=53,
    )  # fmt: skip
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    draws = Draws(0)
    draws.refill(model, 0.02)
    # the default init hardly lets attention speak
    draws.refill(model.get_decoder(), 0.2, embedding=0.5)
    return model


def inputs_of(*rows, seed=0):
    """A batch, padded on the left; a row is its text before and after one picture."""
    draws = Draws(seed)
    lists = []
    for before, after in rows:
        text = draws.integers(3, 45, before + after).tolist()
        lists.append([*text[:before], 52, *[IMAGE] * CELLS, 53, *text[before:]])
    width = max(map(len, lists))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in lists])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": draws.normal(len(rows) * CELLS * 4, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 12, 12]] * len(rows)),
    }


def answer(model, given, tokens=6, **options):
    out = model.generate(
        **given, do_sample=False, max_new_tokens=tokens, suppress_tokens=SUPPRESSED, **options
    )
    return out if options else out[:, given["input_ids"].shape[1] :]


class Masked:
    """A baseline by its meaning: one forward over prompt and answer, with a mask per layer.

    Shares nothing with the package. `hidden(layer)` is bool [N], the prompt's slots that no later
    query of that layer may see; no cache, no eviction, no kernel.
    """

    def __init__(self, model, hidden=None):
        self.model, self.hidden, self.shares = model, hidden, {}

    def attention(self, module, q, k, v, mask, scaling=None, **kwargs):
        size, layer = q.shape[2], module.layer_idx
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        seen = torch.ones(size, size).tril().bool()
        hidden = self.hidden(layer) if self.hidden else None
        if hidden is not None:
            seen[:, : len(hidden)] &= ~hidden
            seen |= torch.eye(size).bool()
        share = (scaling * q @ k.transpose(2, 3)).masked_fill(~seen, -torch.inf).softmax(-1)
        self.shares[layer] = share
        return (share @ v).transpose(1, 2), None

    def logits(self, given, answer):
        """Of every answer token, [tokens, vocabulary]."""
        config = self.model.get_decoder().config
        before = config._attn_implementation
        transformers.AttentionInterface.register("masked_oracle", self.attention)
        config._attn_implementation_internal = "masked_oracle"
        ids = torch.cat([given["input_ids"], answer], 1)
        given = dict(given, input_ids=ids, mm_token_type_ids=(ids == IMAGE).int())
        del given["attention_mask"]
        try:
            with torch.no_grad():
                out = self.model(**given).logits[0]
        finally:
            config._attn_implementation_internal = before
        return out[-1 - answer.shape[1] : -1]


def assert_answers(model, method, given, hidden):
    """The answer under `method`, and its logits, are those of the oracle."""
    with methods.apply(model, method):
        made = answer(model, given, return_dict_in_generate=True, output_logits=True)
    tokens = made.sequences[:, given["input_ids"].shape[1] :]
    wanted = Masked(model, hidden).logits(given, tokens)
    torch.testing.assert_close(torch.cat(made.logits), wanted)


def ranking_of(model, given, layer):
    """Attention of the last prompt token in a layer of the plain model, head mean, [N]."""
    oracle = Masked(model)
    oracle.logits(given, torch.tensor([[7]]))
    share = oracle.shares[layer][0, :, -2].mean(0)  # the query before the answer's token
    return share[: given["input_ids"].shape[1]]


def dropped_by(score, visual, count):
    kept = torch.zeros_like(visual)
    kept[score.masked_fill(~visual, -1).topk(count).indices] = True
    return visual & ~kept


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_fastv_hides_the_lowest_ranked_from_the_later_layers(model, k, ratio):
    given = inputs_of((4, 6))
    visual = given["input_ids"][0] == IMAGE
    dropped = dropped_by(ranking_of(model, given, k - 1), visual, round(ratio * CELLS))
    method = methods.FastV(ratio=ratio, k=k)
    assert_answers(model, method, given, lambda layer: dropped if layer >= k else None)


def test_the_oracle_sees_another_choice(model):
    """The comparison above fails where one other token is kept."""
    given = inputs_of((4, 6))
    visual = given["input_ids"][0] == IMAGE
    dropped = dropped_by(ranking_of(model, given, 1), visual, 11)
    kept, gone = (visual & ~dropped).nonzero()[0], dropped.nonzero()[0]
    dropped[kept], dropped[gone] = True, False
    with pytest.raises(AssertionError, match="not close"):
        assert_answers(
            model, methods.FastV(ratio=0.3), given, lambda layer: dropped if layer >= 2 else None
        )


def test_fastv_takes_the_rest_out_of_the_cache(model):
    given = inputs_of((4, 6))
    size = given["input_ids"].shape[1]
    cache = transformers.DynamicCache(config=model.config.text_config)
    with methods.apply(model, methods.FastV(ratio=0.25)) as run:
        answer(model, given, past_key_values=cache, return_dict_in_generate=True)
    held = [layer.keys.shape[2] for layer in cache.layers]
    seen = size + 5  # the last token is never read
    assert held == [seen, seen, *[seen - 27] * (LAYERS - 2)]
    assert cache.get_seq_length(3) == seen
    assert run.retention == 0.25


@pytest.mark.parametrize("merging", [False, True])
def test_lookm_of_everything_is_dense(model, merging):
    given = inputs_of((4, 6))
    assert_answers(model, methods.LookM(ratio=1.0, merging=merging), given, None)


@pytest.mark.parametrize("k", [1, 3])
def test_fastv_of_everything_is_dense(model, k):
    assert_answers(model, methods.FastV(ratio=1.0, k=k), inputs_of((4, 6)), None)


METHODS = {
    "fastv": lambda: methods.FastV(ratio=0.2),
    "fastv-every-step": lambda: methods.FastV(ratio=0.2, every_step=True),
    "fastv-then": lambda: methods.FastV(
        ratio=0.5, then=vp.PulseConfig(anchor=3, tau=0.4, ratio=(0.1, 0.4))
    ),
    "visionzip": lambda: methods.VisionZip(ratio=0.2),
    "lookm": lambda: methods.LookM(ratio=0.2),
    "blind": methods.Blind,
    "none-after": lambda: methods.NoneAfter(anchor=2),
    "random-tokens": lambda: methods.RandomTokens(ratio=0.2, anchor=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_left_as_it_was(model, name):
    given = inputs_of((4, 6))
    before = answer(model, given)
    text, vision = model.config.text_config, model.config.vision_config
    names = text._attn_implementation, vision._attn_implementation
    known = set(transformers.AttentionInterface().valid_keys())
    with methods.apply(model, METHODS[name]()):
        answer(model, given)
    assert (text._attn_implementation, vision._attn_implementation) == names
    assert set(transformers.AttentionInterface().valid_keys()) == known
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert torch.equal(answer(model, given), before)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "random-tokens"])
def test_a_padded_row_answers_as_it_does_alone(model, name):
    both = inputs_of((2, 3), (9, 12))
    with methods.apply(model, METHODS[name]()) as run:
        batch = answer(model, both)
    kept = torch.stack(run.kept)  # [steps, B]
    for row in range(2):
        padding = int((both["attention_mask"][row] == 0).sum())
        patches = CELLS * 4
        alone = {
            key: both[key][row : row + 1, padding:]
            for key in ("input_ids", "attention_mask", "mm_token_type_ids")
        } | {
            "pixel_values": both["pixel_values"][row * patches : (row + 1) * patches],
            "image_grid_thw": both["image_grid_thw"][:1],
        }
        with methods.apply(model, METHODS[name]()) as run:
            assert torch.equal(answer(model, alone)[0], batch[row])
        assert torch.equal(torch.stack(run.kept)[:, 0], kept[:, row])


def test_every_step_ranking_is_a_fixed_budget_with_an_early_anchor(model):
    """Up to the prefill, which FastV prunes too: with every token kept there, they are one."""

    class DensePrefill(methods.FastV):
        def visible(self, prompt, layer):
            return None

    given = inputs_of((4, 6))
    config = vp.PulseConfig(anchor=1, budget=vp.Fixed(8 / CELLS), anchor_output="dense")
    with vp.patch(model, config):
        wanted = answer(model, given)
    with methods.apply(model, DensePrefill(ratio=8 / CELLS, every_step=True)) as run:
        assert torch.equal(answer(model, given), wanted)
    assert {int(k) for k in torch.cat(run.kept)} == {8}


def test_then_prunes_what_fastv_left(model):
    given = inputs_of((4, 6))
    rest = vp.PulseConfig(anchor=3, ratio=(1.0, 1.0))
    with methods.apply(model, methods.FastV(ratio=0.5)):
        wanted = answer(model, given)
    with methods.apply(model, methods.FastV(ratio=0.5, then=rest)) as run:
        assert torch.equal(answer(model, given), wanted)
    assert run.retention == 0.5
    with methods.apply(
        model, methods.FastV(ratio=0.5, then=rest.updated(budget=vp.TopK(3)))
    ) as run:
        answer(model, given)
    assert {int(k) for k in torch.cat(run.kept)} == {3}


def test_blind_steps_see_no_picture(model):
    """Other pictures behind the same prefill change nothing: only the cache of text is read."""
    given = inputs_of((4, 6))
    visual = given["input_ids"][0] == IMAGE

    class Scrambled(methods.Blind):
        def after_prefill(self, prompt, cache):
            for layer in cache.layers:
                layer.keys[:, :, visual] = 1e4
                layer.values[:, :, visual] = torch.nan

    with methods.apply(model, methods.Blind()) as run:
        wanted = answer(model, given)
    assert run.retention == 0.0
    with methods.apply(model, Scrambled()):
        assert torch.equal(answer(model, given), wanted)
    with methods.apply(model, methods.NoneAfter(anchor=1)):
        assert not torch.equal(answer(model, given, tokens=24), answer_blind(model, given))


def answer_blind(model, given):
    with methods.apply(model, methods.Blind()):
        return answer(model, given, tokens=24)


def test_random_tokens_change_from_step_to_step(model):
    given, seen = inputs_of((4, 6), (5, 5)), []

    class Watched(methods.RandomTokens):
        def _draw(self, prompt):
            seen.append((super()._draw(prompt), prompt.visual))
            return seen[-1][0]

    with methods.apply(model, Watched(ratio=0.2, anchor=1)):
        answer(model, given)
    for selection, visual in seen:
        for row, count in enumerate(selection.counts.tolist()):
            kept = selection.indices[row, :count].long()
            assert count == 7 and (kept.diff() > 0).all() and visual[row, kept].all()
    assert len({tuple(s.indices[0].tolist()) for s, _ in seen}) == len(seen)


def test_what_cannot_run_is_refused(model):
    def refuse(method, reason):
        with pytest.raises(ValueError, match=reason), methods.apply(model, method):
            pass

    refuse(methods.FastV(0.1, k=LAYERS), "k must be in")
    refuse(methods.FastV(0.1, then=vp.PulseConfig(anchor=1)), "one anchor in")
    with vp.patch(model):
        refuse(methods.Blind(), "unpatch it")
    for make in (methods.FastV, methods.LookM, methods.VisionZip):
        with pytest.raises(ValueError, match="ratio"):
            make(0.0)
    given = inputs_of((4, 6))
    cache = transformers.DynamicCache(config=model.config.text_config)
    answer(model, given, past_key_values=cache, return_dict_in_generate=True)
    with methods.apply(model, methods.Blind()), pytest.raises(ValueError, match="one prompt"):
        model(input_ids=given["input_ids"][:, -3:], past_key_values=cache)
    with methods.apply(model, methods.Blind()), pytest.raises(ValueError, match="beams"):
        model(input_ids=given["input_ids"][:, -1:], past_key_values=cache)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_lookm_keeps_its_own_tokens_per_layer_and_head(model):
    given = inputs_of((4, 6))
    size, visual = given["input_ids"].shape[1], given["input_ids"][0] == IMAGE
    oracle = Masked(model)
    oracle.logits(given, torch.tensor([[7]]))
    full = transformers.DynamicCache(config=model.config.text_config)
    cut = transformers.DynamicCache(config=model.config.text_config)
    answer(model, given, 1, past_key_values=full, return_dict_in_generate=True)
    with methods.apply(model, methods.LookM(ratio=0.25, merging=False)):
        answer(model, given, 1, past_key_values=cut, return_dict_in_generate=True)
    kept_sets = set()
    for layer in range(LAYERS):
        share = oracle.shares[layer][0, :, :size, :size]  # [H, N, N]
        for g in range(2):
            score = share[2 * g : 2 * g + 2].sum((0, 1))
            kept = ~dropped_by(score, visual, 9)
            kept_sets.add(tuple(kept.nonzero()[:, 0].tolist()))
            for name in ("keys", "values"):
                wanted = getattr(full.layers[layer], name)[0, g, kept]
                torch.testing.assert_close(getattr(cut.layers[layer], name)[0, g], wanted)
    assert len(kept_sets) > 1


def test_visionzip_hides_what_it_merged_from_every_layer(model):
    """Its tokens are those the tower's last block looks at, and no layer sees the others."""
    given, found = inputs_of((4, 6)), {}

    class Watched(methods.VisionZip):
        def embed(self, prompt, inputs):
            out = super().embed(prompt, inputs)
            found["hidden"] = prompt.visual[0] & ~self._keep[0]
            return out

    method = Watched(ratio=0.25, contextual=0.0)  # without merging the features stay as they are
    assert_answers(model, method, given, lambda layer: found["hidden"])
    shares = []

    def look(module, q, k, v, attention_mask=None, scaling=None, **kwargs):
        shares.append((scaling * q @ k.transpose(2, 3)).softmax(-1))
        return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2), None

    config = model.config.vision_config
    before = config._attn_implementation
    transformers.AttentionInterface.register("vision_oracle", look)
    config._attn_implementation_internal = "vision_oracle"
    try:
        with torch.no_grad():
            model(**given)
    finally:
        config._attn_implementation_internal = before
    received_by = shares[-1][0].mean((0, 1)).view(CELLS, 4).mean(1)
    visual = given["input_ids"][0] == IMAGE
    wanted = torch.zeros(CELLS).bool()
    wanted[received_by.topk(9).indices] = True
    assert torch.equal(~found["hidden"][visual], wanted)
