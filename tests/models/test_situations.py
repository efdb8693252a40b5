"""Situations that not every family has: videos, assistants, dispatched models, a user's loop."""

import pytest
import torch
import transformers

import visionpulse as vp
from visionpulse.testing.draw import Draws

KEEP_ALL = vp.PulseConfig(ratio=(1.0, 1.0))
PRUNED = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4))
VIDEO = 151


def video_of(vlm, family):
    """A prompt with a video of two frames, and its number of tokens."""
    draws = Draws(1)
    if family == "qwen2_5_vl":
        tokens = 32
        extra = {
            "pixel_values_videos": draws.normal(128, 3 * 2 * 4 * 4),
            "video_grid_thw": torch.tensor([[2, 8, 8]]),
        }
    else:
        tokens = 2 * 4 + 1
        extra = {"pixel_values_videos": draws.normal(1, 2, 3, 32, 32)}
    ids = torch.tensor([[5, 6, 152, *[VIDEO] * tokens, 153, 9, 8, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | extra
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = 2 * (ids == VIDEO).int()
    return inputs, tokens


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_video_tokens_are_visual(tiny, family):
    vlm = tiny(family)
    inputs, tokens = video_of(vlm, family)
    expected = vlm.generate(inputs)
    with vp.patch(vlm.model, KEEP_ALL) as session:
        assert torch.equal(vlm.generate(inputs), expected)
        assert session.stats.kept.min == tokens
        session.update(ratio=(0.1, 0.3))
        session.reset_stats()
        vlm.generate(inputs)
        assert 1 <= session.stats.kept.min <= session.stats.kept.max <= int(0.3 * tokens)


def test_assisted_generation(tiny):
    vlm = tiny("llava")
    helper = tiny("llava", num_hidden_layers=2).model
    inputs = vlm.inputs()
    expected = vlm.generate(inputs, tokens=16, assistant_model=helper)
    with vp.patch(vlm.model, KEEP_ALL) as session, vp.patch(helper, PRUNED):
        with pytest.warns(UserWarning, match="assistant model"):  # it is given no picture
            vlm.generate(inputs, tokens=16, assistant_model=helper)
        assert torch.equal(vlm.generate(inputs, tokens=16, assistant_model=helper), expected)
        session.update(schedule="lookback")
        assert torch.equal(vlm.generate(inputs, tokens=16, assistant_model=helper), expected)


def test_a_dispatched_model(tiny, tmp_path):
    pytest.importorskip("accelerate")
    vlm = tiny("llava")
    vlm.model.save_pretrained(tmp_path / "model")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm")}
    places["model.language_model.rotary_emb"] = "cpu"
    places |= {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "away")
    ).eval()
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [150, 151, 152, 153]}
    with vp.patch(vlm.model, PRUNED):
        expected = vlm.generate(vlm.inputs())
    with vp.patch(model, PRUNED) as session:
        assert torch.equal(model.generate(**vlm.inputs(), **options), expected)
        assert session.stats.steps == 7


def test_a_loop_of_ones_own(tiny):
    vlm = tiny("qwen2_5_vl")
    with vp.patch(vlm.model, PRUNED) as session, torch.no_grad():
        expected = vlm.generate(vlm.inputs())
        out = vlm.model(**vlm.inputs(), use_cache=True)
        tokens, cache = [], out.past_key_values
        for _ in range(8):
            logits = out.logits[:, -1].clone()
            logits[:, [150, 151, 152, 153]] = -torch.inf
            tokens.append(logits.argmax(-1, keepdim=True))
            out = vlm.model(input_ids=tokens[-1], past_key_values=cache, use_cache=True)
        assert torch.equal(torch.cat(tokens, 1), expected[:, -8:])
        assert session.stats.steps == 7 + 8


def test_the_inner_model_alone(tiny):
    vlm = tiny("llava")
    with torch.no_grad():
        expected = vlm.model.model(**vlm.inputs()).last_hidden_state
        session = vp.patch(vlm.model.model, PRUNED)
        assert torch.equal(vlm.model.model(**vlm.inputs()).last_hidden_state, expected)
        out = vlm.generate(vlm.inputs())
        assert session.stats.steps == 7
        session.unpatch()
        with vp.patch(vlm.model, PRUNED):
            assert torch.equal(vlm.generate(vlm.inputs()), out)


def test_double_precision_is_served_by_the_reference(tiny, oracle):
    vlm = tiny("llava", num_hidden_layers=4)
    vlm.model.to(torch.float64)  # served by the reference alone: no rounding between the two
    inputs = vlm.inputs([9, "i", 3], [4, "i", 5])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with vp.patch(vlm.model, PRUNED) as session:
        pruned = vlm.generate(inputs, tokens=16)
        anchor = session.anchors[0]
    with oracle(vlm, PRUNED, anchor) as truth:
        truth.visual = inputs["input_ids"] == 150
        assert torch.equal(vlm.generate(inputs, tokens=16), pruned)


def test_a_trace_tells_what_was_kept(tiny, tmp_path):
    vlm = tiny("llava")
    inputs = vlm.inputs([9, "i", 6, "i", 3], [4, "i", 5], [8])
    with vp.patch(vlm.model, PRUNED, record=True) as session:
        out = vlm.generate(inputs)
        trace, stats = session.trace, session.stats
    rows = list(trace)
    assert len(rows) == len(trace) == stats.rows == 7 * 2  # the row without a picture is left out
    assert [row.step for row in rows] == [step for step in range(7) for _ in range(2)]
    assert {row.layer for row in rows} == set(session.anchors)
    visual = inputs["input_ids"] == 150
    prompt = visual.shape[1]
    for row in rows:
        assert row.n_visual == visual[row.row].sum()
        assert visual[row.row, torch.from_numpy(row.kept.copy())].all()
        assert row.token == out[row.row, prompt + row.step]
    assert sum(len(row.kept) for row in rows) / len(rows) == pytest.approx(stats.kept.mean)
    assert trace.spans[0, 1] == [(int(visual[1].nonzero()[0]), int(visual[1].nonzero()[-1]) + 1)]
    trace.save(tmp_path / "trace.npz")
    again = vp.Trace.load(tmp_path / "trace.npz")
    for mine, loaded in zip(rows, again, strict=True):
        assert mine[:-1] == loaded[:-1]
        assert (mine.kept == loaded.kept).all()
    assert again.spans == trace.spans
    assert again.about["anchors"] == list(session.anchors)
    with vp.patch(vlm.model) as session, pytest.raises(ValueError, match="record=True"):
        session.trace  # noqa: B018
