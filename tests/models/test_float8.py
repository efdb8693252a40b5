"""cache="fp8": a patched model whose cache is half as large, and what reads it."""

import copy
import gc

import pytest
import torch
from transformers import DynamicCache, cache_utils

import visionpulse as vp
from visionpulse.backends import get
from visionpulse.float8 import FLOAT8
from visionpulse.models.step import Step
from visionpulse.schedule import Role
from visionpulse.testing import compare

PRUNED = vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4), cache="fp8", backend="reference")
PROMPTS = ([9, "i", 6, "i", 3], [4, "i", 5])


class Rounded(cache_utils.DynamicLayer):
    """A dynamic layer that rounds to 8 bits by other code, and holds the numbers read back."""

    scale = None

    def update(self, key_states, value_states, *args, **kwargs):
        new, past = torch.stack((key_states, value_states)), self.get_seq_length()
        largest = new.abs().amax((1, 3, 4), keepdim=True)  # [2, 1, G, 1, 1]
        wanted = 2.0 ** (largest.log2().floor() - 6)
        if not past:
            self.scale = wanted
        elif new.shape[3] > 1 and (wanted > self.scale).any():
            self.scale = wanted.maximum(self.scale)
            old = self._rounded(torch.stack((self.keys, self.values)))
            self.keys, self.values = old
        before = (self.keys, self.values) if past else None
        keys, values = super().update(*self._rounded(new))
        if new.shape[3] == 1:
            return keys, values
        if not past:
            return key_states, value_states
        return tuple(torch.cat(pair, 2) for pair in zip(before, new, strict=True))

    def _rounded(self, new):
        steps = (new / self.scale).clamp(-448, 448)
        return steps.to(FLOAT8).to(new.dtype) * self.scale


def greedy(vlm):
    return vlm.generate(vlm.inputs())


def left_padded(vlm):
    return vlm.generate(vlm.inputs(*PROMPTS))


def beams_of_a_batch(vlm):
    return vlm.generate(vlm.inputs([9, "i", 3], [4, "i", 5]), num_beams=2)


SITUATIONS = {greedy: (), left_padded: PROMPTS, beams_of_a_batch: ([9, "i", 3], [4, "i", 5])}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
def test_tokens_are_those_of_the_oracle_on_rounded_keys_and_values(
    tiny, family, situation, oracle, monkeypatch
):
    vlm = tiny(family)
    with vp.patch(vlm.model, PRUNED) as session:
        found = situation(vlm)
        anchor = session.anchors[0]
        assert session.stats.clamped == 0
    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Rounded)
    with oracle(vlm, PRUNED, anchor) as truth:
        truth.visual = vlm.inputs(*SITUATIONS[situation])["input_ids"] == 150
        assert torch.equal(found, situation(vlm))


class Watched:
    """Every layer of every step beside the float64 reference on what its cache stands for."""

    def __init__(self, monkeypatch):
        self.roles = set()
        run = Step.run

        def watch(step, role, layer, query, key, value, mask, scale, softcap):
            out = run(step, role, layer, query, key, value, mask, scale, softcap)
            if key.dtype == FLOAT8:
                stored = step.kv_layers[layer]
                self.check(step, role, query, key, value, stored, scale, out)
            return out

        monkeypatch.setattr(Step, "run", watch)

    def check(self, step, role, query, key, value, stored, scale, out):
        kv = vp.KVCache(key, value, step.lengths, step.starts, stored.k_scale, stored.v_scale)
        visual = step.visual
        if visual is None:
            visual = vp.VisualTokens.from_spans([[]] * key.shape[0])
        config, queries = step.config, query.shape[2]
        params = vp.ops.numbers(query[:, :, 0], scale, None, None)._replace(
            tau=config.tau, r_min=config.ratio[0], r_max=config.ratio[1], score=config.score
        )
        for i in range(queries):
            lengths = kv.lengths
            if queries > 1:
                lengths = torch.full((key.shape[0],), key.shape[2] - queries + 1 + i).int()
            part = vp.KVCache(key, value, lengths, kv.starts, kv.k_scale, kv.v_scale)
            exact = compare.Exact(query[:, :, i].contiguous(), part, visual, params)
            selection = None if role is Role.DENSE else step.selection
            if selection is not None:
                selection = selection.query(i, queries)
            if role is Role.ANCHOR:
                compare.assert_masses(selection.mass, selection.mass_mean, exact)
                compare.assert_counts(selection, exact.n_visual, params)
                compare.assert_valid_selection(selection, exact.scores, exact.candidate)
            compare.assert_output(out[:, i], exact, selection)
        self.roles.add((role.value, "text" if step.visual is None else queries))


BACKENDS = [name for name in ("reference", "cpu") if get(name).reads_float8]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["paper", "lookback", "per_layer"])
def test_each_kind_of_step_is_that_of_the_contract(tiny, monkeypatch, schedule, dtype, name):
    vlm = tiny("qwen3_vl", num_hidden_layers=4)
    vlm.model.to(dtype)
    config = PRUNED.updated(backend=name, schedule=schedule)
    watched = Watched(monkeypatch)
    with vp.patch(vlm.model, config):
        for prompts in (PROMPTS, ([12],)):
            vlm.generate(vlm.inputs(*prompts), tokens=4)
    early = set() if schedule == "per_layer" else {("dense", 1), ("follower", 1)}
    assert watched.roles == {("anchor", 1), ("dense", "text"), *early}


def test_several_queries_are_as_sparse_as_one_by_one(tiny, monkeypatch):
    vlm, found = tiny("llava"), []
    tokens = torch.tensor([[7, 8, 9, 11], [21, 22, 23, 24]])
    watched = Watched(monkeypatch)
    for widths in ([1] * 4, [4]):
        with vp.patch(vlm.model, PRUNED.updated(queries="sparse")), torch.no_grad():
            cache = DynamicCache(config=vlm.model.config.get_text_config())
            vlm.model(**vlm.inputs([9, "i", 3], [2, "i", 10]), past_key_values=cache)
            parts = [vlm.model(input_ids=part, past_key_values=cache).logits
                     for part in tokens.split(widths, dim=1)]  # fmt: skip
        found.append(torch.cat(parts, 1))
    assert {("anchor", 4), ("follower", 4)} <= watched.roles
    # a key that rounds the other way moves a logit by more than float32 does
    assert torch.allclose(found[1], found[0], atol=0.05)


def test_a_prefill_is_the_unpatched_one(tiny):
    vlm = tiny("qwen3_vl")
    with torch.no_grad():
        expected = vlm.model(**vlm.inputs()).logits
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        with vp.patch(vlm.model, PRUNED):
            logits = vlm.model(**vlm.inputs(), past_key_values=cache).logits
    assert torch.equal(logits, expected)
    assert cache.layers[0].keys.dtype == FLOAT8


def test_a_second_chunk_attends_to_what_is_stored_and_to_its_own_numbers(tiny, monkeypatch):
    vlm, seen = tiny("llava"), []
    module = vp.models.attention
    real = module.base_attention

    def spy(layer):
        def attend(layer, query, key, value, *args, **kwargs):
            seen.append((layer.layer_idx, key, value))
            return real(layer)(layer, query, key, value, *args, **kwargs)

        return attend

    with vp.patch(vlm.model, PRUNED), torch.no_grad():
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        size = vlm.model(**vlm.inputs(), past_key_values=cache).logits.shape[1]
        before = [layer.read_back(torch.float32, size) for layer in cache.layers]
        monkeypatch.setattr(module, "base_attention", spy)
        vlm.model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
    assert len(seen) == len(cache.layers)
    for layer, key, value in seen:
        after = cache.layers[layer].read_back(torch.float32, size + 3)
        for got, old, new in zip((key, value), before[layer], after, strict=True):
            assert torch.equal(got[:, :, :size], old)
            assert torch.allclose(got[:, :, size:], new[:, :, size:], rtol=1 / 16, atol=1e-3)
            assert not torch.equal(got[:, :, size:], new[:, :, size:])


def live_bytes():
    """The storages of all tensors alive."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=pytest.mark.deep)])
def test_the_cache_of_8192_tokens_takes_half_the_memory(tiny, kind):
    few_heads = {"num_attention_heads": 2, "head_dim": 64}
    vlm = tiny("llava", num_hidden_layers=2, **few_heads)
    vlm.model.to(torch.bfloat16)
    inputs = vlm.inputs([8192 - 5])

    def taken():
        before = live_bytes()
        with torch.no_grad():
            cache = DynamicCache(config=vlm.model.config.get_text_config())
            if kind == "static":
                cache = cache_utils.StaticCache(vlm.model.config.get_text_config(), 8192)
            vlm.generate(inputs, tokens=4, past_key_values=cache, disable_compile=True)
        return live_bytes() - before

    dense = PRUNED.updated(schedule="dense", ratio=(1.0, 1.0))
    whole = taken()
    with vp.patch(vlm.model, dense):
        vlm.generate(vlm.inputs())  # what a session keeps is no part of a cache
        half = taken()
    text = vlm.model.config.get_text_config()
    numbers = 2 * 2 * 8192 * text.num_key_value_heads * text.head_dim
    assert whole == pytest.approx(2 * numbers, rel=0.01)
    assert half == pytest.approx(whole / 2, rel=0.03)


def test_static_caches_give_the_tokens_of_dynamic_ones(tiny):
    vlm = tiny("qwen3_vl")
    inputs = vlm.inputs(*PROMPTS)
    with vp.patch(vlm.model, PRUNED):
        expected = vlm.generate(inputs)
        found = vlm.generate(inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)


def test_one_graph_serves_several_prompts(tiny):
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    torch._dynamo.reset()
    counters.clear()
    graph = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="aot_eager")
    graph._compile_all_devices = True
    vlm = tiny("llava", num_hidden_layers=2)
    found = []
    with vp.patch(vlm.model, PRUNED) as session:
        for options in ({"disable_compile": True}, {"compile_config": graph}):
            cache = cache_utils.StaticCache(vlm.model.config.get_text_config(), 64)
            for parts in ([5, "i", 7], [9, "i", 12]):
                cache.reset()
                found.append(vlm.generate(vlm.inputs(parts), past_key_values=cache, **options))
        assert session.stats.steps == 4 * 7
    assert all(torch.equal(a, b) for a, b in zip(found[:2], found[2:], strict=True))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_a_step_clamps_is_in_the_statistics(tiny):
    vlm = tiny("llava")
    with vp.patch(vlm.model, PRUNED) as session, torch.no_grad():
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        vlm.model(**vlm.inputs(), past_key_values=cache)
        assert session.stats.clamped == 0
        for layer in cache.layers:
            layer.scales = layer.scales * 2.0**-12  # as if the prompt had been tiny
        vlm.model(input_ids=torch.tensor([[5]]), past_key_values=copy.deepcopy(cache))
        count = session.stats.clamped
        assert count > 0
        assert f"{count} numbers clamped in the cache" in str(session.stats)
        session.reset_stats()
        assert session.stats.clamped == 0


def test_without_the_patch_the_cache_is_read_back(tiny):
    vlm, token = tiny("llava"), torch.tensor([[5]])
    cache = DynamicCache(config=vlm.model.config.get_text_config())
    with torch.no_grad():
        with vp.patch(vlm.model, PRUNED) as session:
            vlm.model(**vlm.inputs(), past_key_values=cache)
            with session.paused():
                vlm.model(input_ids=token, past_key_values=cache)
        logits = vlm.model(input_ids=token, past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.layers[0].keys.dtype == FLOAT8


def test_a_setting_that_changes_behind_a_prompt_is_followed(tiny):
    vlm, token = tiny("llava"), torch.tensor([[5]])
    cache = DynamicCache(config=vlm.model.config.get_text_config())
    with vp.patch(vlm.model, PRUNED.updated(cache="model")) as session, torch.no_grad():
        vlm.model(**vlm.inputs(), past_key_values=cache)
        session.update(cache="fp8")
        vlm.model(input_ids=token, past_key_values=cache)
        assert session.stats.steps == 1
    assert all(layer.keys.dtype == FLOAT8 for layer in cache.layers)


def test_a_cache_that_the_decoder_makes_is_of_8_bits_too(tiny):
    vlm = tiny("llava")
    with vp.patch(vlm.model, PRUNED) as session, torch.no_grad():
        cache = vlm.model(**vlm.inputs(), use_cache=True).past_key_values
        assert all(layer.keys.dtype == FLOAT8 for layer in cache.layers)
        vlm.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert session.stats.steps == 1


def test_a_static_cache_that_generate_keeps_goes_with_the_patch(tiny):
    vlm = tiny("llava")
    with vp.patch(vlm.model, PRUNED):
        vlm.generate(vlm.inputs(), cache_implementation="static", disable_compile=True)
        cache = cache_utils.StaticCache(vlm.model.config.get_text_config(), 64)
        vlm.generate(vlm.inputs(), past_key_values=cache, disable_compile=True)
        vlm.model._cache = cache  # as some versions of transformers do
    assert not hasattr(vlm.model, "_cache")


def test_settings_that_exclude_each_other_are_refused(tiny):
    with pytest.raises(ValueError, match="dense='model'"):
        vp.PulseConfig(cache="fp8", dense="model")
    with pytest.raises(ValueError, match="unknown cache 'fp4'"):
        vp.PulseConfig(cache="fp4")
    vlm = tiny("llava")
    with pytest.raises(ValueError, match="lossless=True gives the tokens of the unpatched model"):
        vp.patch(vlm.model, PRUNED, lossless=True)
    with (
        vp.patch(vlm.model, PRUNED.updated(cache="model"), lossless=True) as session,
        pytest.raises(ValueError, match="a cache of 8 bits changes them"),
    ):
        session.update(cache="fp8")
    vlm.model.config.get_text_config().num_kv_shared_layers = 1
    try:
        with pytest.raises(vp.UnsupportedModelError, match="keys and values of others"):
            vp.patch(vlm.model, PRUNED)
    finally:
        del vlm.model.config.get_text_config().num_kv_shared_layers
    tiny.forget()
    with vp.patch(vlm.model, PRUNED), pytest.raises(TypeError, match="needs a cache of transform"):
        vlm.model(**vlm.inputs(), past_key_values=cache_utils.EncoderDecoderCache(
            DynamicCache(), DynamicCache()))  # fmt: skip


def test_explain_says_the_bytes_of_a_token(tiny):
    vlm = tiny("llava", num_hidden_layers=2, head_dim=64)
    text = vlm.model.config.get_text_config()
    numbers = 2 * 2 * text.num_key_value_heads * 64
    whole, half = (vp.explain(vlm.model, PRUNED.updated(cache=kind)) for kind in ("model", "fp8"))
    assert (whole.token_bytes, half.token_bytes) == (4 * numbers, numbers)
    assert f"{numbers / 1024:.4g} KiB a token in the layers of full attention, 8 bits" in str(half)
    assert half.backend.name == "reference"


def test_explain_says_what_a_patched_model_holds_and_moves(tiny):
    vlm = tiny("llava", num_hidden_layers=4, head_dim=64)
    vlm.model.to(torch.bfloat16)
    with vp.patch(vlm.model, PRUNED.updated(anchor=1)):
        small = vp.explain(vlm.model)
    whole = vp.explain(vlm.model, PRUNED.updated(anchor=1, cache="model"))
    assert small.patched and "8 bits" in str(small) and "8 bits" not in str(whole)
    heads = vlm.model.config.get_text_config().num_key_value_heads
    held = 4 * 2 * heads * (64 * (8192 - 256 + 256) + 4)  # a byte a number, a scale a head
    assert small.memory(8192 - 256).held == held
    assert small.memory(8192 - 256).held == 8192 * small.token_bytes + 4 * 2 * heads * 4
    assert whole.memory(8192 - 256).held == 8192 * whole.token_bytes
    assert small.memory(100, text=7, rows=3).held == 4 * 2 * heads * (64 * 3 * 107 + 4)
    steps = small.memory(8192).moved
    assert steps["lookback"] < steps["paper"] < steps["dense"] < whole.memory(8192).moved["dense"]
    moved = f"           a step moves {small.memory(32768).moves}"
    assert moved in str(small).splitlines() and "MiB paper" in moved and len(moved) <= 80


def test_what_explain_says_is_held_is_what_is_allocated(tiny):
    vlm = tiny("llava", num_hidden_layers=2, head_dim=64)
    vlm.model.to(torch.bfloat16)
    inputs = vlm.inputs([4096 - 5])
    with vp.patch(vlm.model, PRUNED):
        said = vp.explain(vlm.model).memory(4095, text=1).held
        vlm.generate(vlm.inputs())
        before = live_bytes()
        with torch.no_grad():
            cache = DynamicCache(config=vlm.model.config.get_text_config())
            vlm.generate(inputs, tokens=4, past_key_values=cache, disable_compile=True)
        assert live_bytes() - before == pytest.approx(said, rel=0.03)


@pytest.mark.parametrize("option", [("--cache", "fp8"), ("--set", "cache=fp8")])
def test_a_program_runs_with_8_bits(tmp_path, monkeypatch, capsys, option):
    from visionpulse.cli import run

    (tmp_path / "program.py").write_text(
        "import sys\nhome = sys.modules['visionpulse.models.install']\n"
        "print(home._installed.config.cache)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run.main([*option, "--", "program.py"]) == 0
    assert capsys.readouterr().out == "fp8\n"
