"""The counts of the cost model, against a model that is counted while it runs and against the
figures that were worked out by hand for the published shapes."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import visionpulse as vp
from visionpulse.bench import cost
from visionpulse.bench.memory import gib, memory
from visionpulse.schedule import Role

PUBLISHED = cost.KNOWN["qwen3-vl-4b"]


def shape_of(visual, rows=1, text=256, itemsize=2):
    return cost.OpShape(rows, 32, 8, 128, text, visual, itemsize)


def tiny_config():
    transformers = pytest.importorskip("transformers")
    return transformers.Qwen3Config(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip


def test_flops_are_those_of_a_model_that_runs():
    import transformers

    config = tiny_config()
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    decoder = cost.Decoder.of(config)
    ids = torch.arange(11)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as prefill:
        cache = model(ids, use_cache=True).past_key_values
    with torch.no_grad(), FlopCounterMode(display=False) as step:
        model(ids[:, :1], past_key_values=cache)
    # rotary frequencies are one more product, of an outer shape, in each forward
    rope = 2 * config.head_dim // 2
    assert prefill.get_total_flops() - rope * 11 == cost.flops(decoder, 4, 7, 0)
    both = cost.flops(decoder, 4, 7, 1) - cost.flops(decoder, 4, 7, 0)
    assert step.get_total_flops() - rope == both


def test_weights_are_those_of_a_model():
    import transformers

    config = tiny_config()
    model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    embedding = config.vocab_size * config.hidden_size  # one row of it is read
    assert cost.Decoder.of(config).weights() == matrices - embedding


def test_the_paper_form_is_equation_one():
    decoder = cost.Decoder(2, 8, 16, 4, 2, 2, 10)
    linear = 8 * 8 * 8 + 4 * 16 * 8
    steps = sum(linear + 4 * 8 * (3 + 5 + t) for t in (1, 2, 3))
    by_hand = 2 * ((3 + 5) * linear + 4 * 8 * 8 * 8 + steps)
    assert cost.paper_flops(decoder, 3, 5, 3) == by_hand


def test_both_forms_agree_where_the_paper_leaves_nothing_out():
    """As many KV heads as heads, a width of heads times head dim, two FFN matrices."""
    decoder = cost.Decoder(3, 32, 64, 4, 4, 8, 10, gated=False)
    assert cost.flops(decoder, 5, 7, 9) == cost.paper_flops(decoder, 5, 7, 9)


@pytest.mark.parametrize(
    "rows, visual, dense, scan, follower",
    # megabytes of one layer, bf16, 256 text tokens, 5 % kept
    [(1, 4096, 17.8, 9.9, 1.9), (1, 16384, 68.2, 36.3, 4.4), (8, 32768, 1082, 572, 62.1)],
)
def test_bytes_of_the_published_shapes(rows, visual, dense, scan, follower):
    shape, kept = shape_of(visual, rows), visual // 20
    assert cost.dense(shape).bytes / 1e6 == pytest.approx(dense, rel=0.01)
    assert cost.decode(shape, kept).bytes / 1e6 == pytest.approx(scan, rel=0.01)
    assert cost.attend(shape, kept).bytes / 1e6 == pytest.approx(follower, rel=0.02)


def test_the_ops_add_up():
    """Keeping all costs what dense attention costs, apart from the indices."""
    shape = shape_of(4096, rows=3)
    assert cost.attend(shape, 4096).flops == cost.dense(shape).flops
    assert cost.attend(shape, 4096).bytes - cost.dense(shape).bytes == 3 * 4 * 4096
    assert cost.decode(shape, 7, "dense").flops == cost.dense(shape).flops
    assert cost.decode(shape, 7).streamed > cost.score(shape).bytes - 3 * 4 * 4096


def test_a_step_is_the_sum_of_its_roles():
    config = vp.PulseConfig(anchor=17)
    assert cost.role_counts(config, (True,) * 36) == {
        Role.DENSE: 17, Role.ANCHOR: 1, Role.FOLLOWER: 18, Role.MODEL: 0
    }  # fmt: skip
    step = cost.decode_step(PUBLISHED, 256, 16384, config=config, retention=0.05)
    shape, kept = shape_of(16384), int(0.05 * 16384)
    by_hand = 17 * cost.dense(shape).bytes + cost.decode(shape, kept).bytes
    assert step.attention.bytes == by_hand + 18 * cost.attend(shape, kept).bytes
    assert step.weights.bytes == pytest.approx(8.0e9, rel=0.01)
    dense = cost.decode_step(PUBLISHED, 256, 16384)
    assert dense.attention.bytes / step.attention.bytes == pytest.approx(1.93, abs=0.01)


@pytest.mark.parametrize("op", ["dense", "attend", "decode", "score"])
def test_8_bits_halve_the_keys_and_values_and_nothing_else(op):
    """By hand, of 3 rows: queries, outputs, scores and indices stay; each head gets two scales."""
    kept, wide = 204, shape_of(4096, rows=3)
    small = wide._replace(kv_itemsize=1)
    one = 3 * 8 * 128  # numbers of a position's keys
    keys = {
        "dense": 2 * wide.keys, "attend": 2 * (256 + kept),
        "decode": wide.keys + 256 + kept, "score": wide.keys,
    }[op]  # fmt: skip
    scales = 4 * 8 * (1 if op == "score" else 2)
    options = {"attend": (kept,), "decode": (kept,)}.get(op, ())
    before, after = (getattr(cost, op)(shape, *options) for shape in (wide, small))
    assert before.bytes - after.bytes == keys * one - scales
    assert before.flops == after.flops
    assert 2 * after.gathered == before.gathered


def test_a_step_with_8_bits_reads_half_in_attention_and_the_same_weights():
    wide, small = (
        cost.decode_step(
            PUBLISHED, 256, 32768, rows=8, config=vp.PulseConfig(anchor=17, cache=kind)
        )
        for kind in ("model", "fp8")
    )
    assert small.weights == wide.weights and small.attention.flops == wide.attention.flops
    assert small.attention.bytes / wide.attention.bytes == pytest.approx(0.5, abs=0.002)
    roof = cost.Roof(4.3e12, 1e15)
    gain = cost.predict(wide.attention, roof) / cost.predict(small.attention, roof)
    assert gain == pytest.approx(2, abs=0.01)


def layer_of(visual, cache="model", rows=1):
    kv_itemsize = cost.stored_itemsize(vp.PulseConfig(cache=cache))
    return shape_of(visual, rows)._replace(kv_itemsize=kv_itemsize)


def test_memory_is_that_of_the_layers_of_full_attention():
    full = (True, False) * 18
    config = vp.PulseConfig(ratio=(0.01, 0.05), cache="fp8")
    held, moved = memory(layer_of(32768, "fp8", rows=2), full, config)
    assert held == 18 * 2 * (2 * 8 * 128 * (32768 + 256) + 8 * 4)
    whole = memory(layer_of(32768, rows=2), full, config.updated(cache="model"))
    assert whole.held == 2 * (held - 18 * 2 * 8 * 4)
    assert list(moved) == ["dense", "paper", "lookback"]
    # layer 18 is the anchor: it and 9 dense ones before it, 8 followers
    shape, kept = layer_of(32768, "fp8", rows=2), int(0.05 * 32768)
    assert moved["dense"] == 18 * cost.dense(shape).bytes
    anchor, follower = cost.decode(shape, kept).bytes, cost.attend(shape, kept).bytes
    assert moved["paper"] == 9 * cost.dense(shape).bytes + anchor + 8 * follower
    assert moved["lookback"] == anchor + 17 * follower


@pytest.mark.parametrize(
    "config",
    [
        vp.PulseConfig(schedule="per_layer"),
        vp.PulseConfig(anchor=(3, 7)),
        vp.PulseConfig(schedule="lookback", anchor=3),
        vp.PulseConfig(anchor=3, queries="sparse", dense="model"),
        vp.PRESETS["dense"],
    ],
    ids=lambda config: f"{config.schedule}-{config.anchor}",
)
def test_memory_of_every_schedule_is_beside_the_dense_one(config):
    held, moved = memory(layer_of(4096), (True,) * 12, config)
    assert held == 12 * layer_of(4096).cache_bytes
    assert list(moved) == list(dict.fromkeys(["dense", "paper", "lookback", config.schedule]))
    if config.ratio[1] < 1:
        assert moved["lookback"] < moved["paper"] < moved["dense"]
    assert memory(layer_of(0), (True,) * 12, config).held == 12 * layer_of(0).cache_bytes


def test_sizes_are_printed_with_three_digits():
    assert [gib(n << 20) for n in (1, 54, 108, 1024, 4644)] == [
        "1.00 MiB", "54.0 MiB", "108 MiB", "1.00 GiB", "4.54 GiB"
    ]  # fmt: skip


def test_prediction_takes_the_longer_of_memory_and_compute():
    work = cost.Work(streamed=100, gathered=40, flops=90)
    assert cost.predict(work, cost.Roof(10, 1000)) == pytest.approx(14)
    assert cost.predict(work, cost.Roof(10, 1000, gather=4)) == pytest.approx(20)
    assert cost.predict(work, cost.Roof(1000, 10)) == pytest.approx(9)


def test_a_decoder_comes_from_a_config_file_or_a_name(tmp_path):
    config = tiny_config()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config.to_dict()}))
    assert cost.decoder_of(str(tmp_path)) == cost.Decoder.of(config)
    assert cost.decoder_of("qwen3-vl-8b").width == 4096
    with pytest.raises(ValueError, match=r"no decoder 'gpt'; known: .*config.json"):
        cost.decoder_of("gpt")
    with pytest.raises(ValueError, match="has no num_hidden_layers"):
        cost.Decoder.of({"hidden_size": 3})


def test_experts_count_once_per_token_in_flops_and_once_per_use_in_bytes():
    one = cost.Decoder(1, 8, 16, 2, 2, 4, 10)
    many = cost.Decoder(1, 8, 16, 2, 2, 4, 10, experts=8, active=2)
    assert many.weights(1) - one.weights(1) == one.one_ffn
    assert many.weights(64) - one.weights(64) == 7 * one.one_ffn
    assert cost.flops(many, 1, 0, 0) - cost.flops(one, 1, 0, 0) == 2 * one.one_ffn
