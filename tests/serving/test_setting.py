"""What an engine was asked for, and what is refused before it starts; no engine is imported."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from visionpulse import backends
from visionpulse.schedule import Role
from visionpulse.serving import plan
from visionpulse.serving.setting import Engine, asked_of, of_request, setting_of
from visionpulse.serving.vllm import compat, facts

FULL = (True,) * 12


def engine(**changes):
    return Engine(**{"full": FULL, "heads": 8, **changes})


def vllm_config(**changes):
    """A config of vLLM with the fields that are read."""
    text = SimpleNamespace(num_hidden_layers=12, num_attention_heads=8)
    fields = {
        "additional_config": {"visionpulse": {"preset": "5pct"}},
        "model_config": SimpleNamespace(
            hf_text_config=text, is_multimodal_model=True, use_mla=False, enforce_eager=True,
            model="some/model",
        ),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "kv_transfer_config": None,
    }  # fmt: skip
    for path, value in changes.items():
        target, _, name = path.partition("__")
        if name == "text":
            vars(text).update(value)
        elif name:
            setattr(fields[target], name, value)
        else:
            fields[target] = value
    return SimpleNamespace(**fields)


def halves(layers, rank, ranks):
    return layers * rank // ranks, layers * (rank + 1) // ranks


def made(**changes):
    config = vllm_config(**changes)
    return setting_of(facts.asked(config), facts.engine_of(config, "cpu", halves))


def test_an_engine_that_asked_for_nothing_has_no_setting(monkeypatch):
    monkeypatch.delenv("VISIONPULSE_SERVING", raising=False)
    for nothing in (None, False, {"preset": "off"}):
        assert asked_of(nothing) is None
    assert facts.asked(vllm_config(additional_config={})) is None


def test_the_environment_asks_where_the_config_does_not(monkeypatch):
    monkeypatch.setenv("VISIONPULSE_SERVING", '{"preset": "5pct"}')
    assert asked_of(None) == {"preset": "5pct"}
    assert asked_of("10pct") == {"preset": "10pct"}
    monkeypatch.setenv("VISIONPULSE_SERVING", "5pct")
    with pytest.raises(ValueError, match="VISIONPULSE_SERVING must hold JSON"):
        asked_of(None)


def test_roles_come_from_the_models_layers():
    setting = made(additional_config={"visionpulse": {"anchor": 4}})
    assert setting.anchors == (4,)
    assert setting.roles[3:6] == (Role.DENSE, Role.ANCHOR, Role.FOLLOWER)


def test_sliding_layers_are_left_alone():
    types = ["sliding_attention", "full_attention"] * 6
    setting = made(model_config__text={"layer_types": types})
    assert setting.roles[0] is Role.MODEL and setting.anchors == (5,)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"cache_config__cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2.*as e4m3"),
        ({"model_config__use_mla": True}, "latent"),
        ({"model_config__is_multimodal_model": False}, "takes no pictures"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        (
            {"parallel_config__decode_context_parallel_size": 2},
            "--decode-context-parallel-size 2",
        ),
        ({"model_config__text": {"alibi": True}}, "ALiBi"),
        ({"model_config__text": {"model_type": "gpt_oss"}}, "sinks"),
        ({"additional_config": {"visionpulse": {"preset": "nope"}}}, "no preset 'nope'"),
        ({"additional_config": {"visionpulse": {"ancor": 3}}}, "no field 'ancor'"),
        ({"additional_config": {"visionpulse": {"dense": "model"}}}, "dense='model'"),
        ({"additional_config": {"visionpulse": {"cache": "fp8"}}}, "--kv-cache-dtype"),
        ({"parallel_config__pipeline_parallel_size": 2}, "leave out --enforce-eager"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_flag(changes, words):
    with pytest.raises(ValueError, match=words):
        made(**changes)


def test_pipeline_stages_that_hold_their_own_anchors_are_served():
    compiled = {"parallel_config__pipeline_parallel_size": 2, "model_config__enforce_eager": False}
    with pytest.raises(ValueError, match=r"pipeline stage 1 .*give the stage its own"):
        made(**compiled)
    for asked in ({"anchor": [2, 6]}, {"schedule": "per_layer"}):
        setting = made(additional_config={"visionpulse": asked}, **compiled)
        assert setting.engine.stages == ((0, 6), (6, 12))


@pytest.mark.parametrize("device, name", (("cpu", "cpu"), ("cuda", "triton")))
def test_an_8_bit_cache_is_served_where_a_kernel_reads_it(monkeypatch, device, name):
    config = vllm_config(cache_config__cache_dtype="fp8")
    for kernels in facts.KERNELS[device]:
        monkeypatch.setattr(type(backends.get(kernels)), "reads_float8", False)

    def obstacles():
        return [o for o in facts.engine_of(config, device, halves).obstacles if "fp8" in o.what]

    assert "no kernel of ours reads keys of 8 bits" in obstacles()[0].what
    monkeypatch.setattr(type(backends.get(name)), "reads_float8", True)
    assert not obstacles()


def test_all_refusals_are_said_at_once():
    with pytest.raises(ValueError, match=r"--kv-cache-dtype.*latent"):
        made(cache_config__cache_dtype="int8", model_config__use_mla=True)


def test_a_follower_needs_an_anchor_in_its_stage():
    engine = replace(facts.engine_of(vllm_config(), "cpu", halves), stages=((0, 6), (6, 12)))
    assert setting_of({"anchor": [4, 6]}, engine).anchors == (4, 6)
    assert len(setting_of({"schedule": "per_layer"}, engine).anchors) == 12
    # an anchor in the last stage leaves the first dense, and nobody follows across
    assert setting_of({"anchor": 6}, engine).anchors == (6,)
    with pytest.raises(ValueError, match="layer 6 follows an anchor of another"):
        setting_of({}, engine)
    with pytest.raises(ValueError, match="stage 1"):
        setting_of({"anchor": [4, 8]}, engine)
    with pytest.raises(ValueError, match="stage 0"):
        setting_of({"schedule": "lookback", "anchor": 6}, engine)


def test_a_budget_between_the_stages_is_refused_in_graphs():
    asked = {"budget": "top_p:0.9"}
    assert setting_of(asked, engine())
    with pytest.raises(ValueError, match="captured graph"):
        setting_of(asked, engine(has_graphs=True))
    for budget in ("fixed:0.1", "top_k:8", "random:3", "dynamic"):
        assert setting_of({"budget": budget}, engine(has_graphs=True))


def test_a_request_chooses_its_budget_or_opts_out():
    setting = setting_of({"preset": "10pct", "anchor": 4}, engine())
    assert of_request(None, setting) is setting.config
    assert of_request("off", setting) is None and of_request(False, setting) is None
    own = of_request("5pct", setting)
    assert (own.tau, own.ratio, own.anchor) == (0.1, (0.01, 0.05), 4)
    assert of_request("top_k:8", setting).budget.k == 8
    for wrong in ("6pct", "top_q:3", {"preset": "5pct"}, 5):
        with pytest.raises(ValueError):
            of_request(wrong, setting)


def test_on_a_gpu_a_request_may_only_opt_out_and_is_told_what_else_to_do():
    setting = setting_of({"preset": "10pct", "anchor": 4}, engine(device="cuda"))
    assert of_request("off", setting) is None and of_request(None, setting) is setting.config
    for wish in ("5pct", "top_k:8", "nonsense"):
        with pytest.raises(ValueError) as refused:
            of_request(wish, setting)
        (line,) = str(refused.value).splitlines()
        for words in ("must be 'off' on a GPU", repr(wish), "leave it out", "engine of its own"):
            assert words in line


@pytest.mark.parametrize(
    "installed, is_served",
    [("0.32.0+cpu", True), ("0.33.1", True), ("0.31.9", False), ("0.34.0", False), ("1.0", False)],
)
def test_versions_outside_the_tested_range_are_refused(monkeypatch, installed, is_served):
    monkeypatch.setattr(compat, "version", lambda: installed)
    reason = compat.unsupported()
    assert (reason is None) == is_served
    assert is_served or "0.32 and 0.33" in reason


def test_the_memory_of_a_cpu_cache_leaves_room_for_ours():
    layers = [4096.0] * 36  # bytes of a token in each layer
    left = compat.cache_bytes(1 << 30, layers, heads=32, longest=32768)
    assert (1 << 30) * 0.5 < left < (1 << 30) - 3 * 32768 * 4096
    assert compat.cache_bytes(1 << 20, layers, heads=32, longest=32768) == 0
    halves = [2048.0] * 36  # the same in 8 bits, unpacked to 16 twice
    packed = compat.cache_bytes(1 << 30, halves, heads=32, longest=32768, wide=2)
    assert 0.95 * left < packed < left
    assert compat.cache_bytes(1 << 20, [], heads=32, longest=32768) == 1 << 20


def test_the_plan_names_anchor_layers_and_what_stays_dense():
    setting = setting_of({"anchor": [2, 7]}, engine())
    said = "\n".join(plan.lines(setting, 4096, {"model": "some/model"}))
    for words in ("some/model", "layer 2, 7 of 12", "2 to 11", "0 to 1", "prefill"):
        assert words in said
