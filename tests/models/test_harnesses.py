"""install, run and the plugin for lmms-eval, against what the harnesses publish."""

import json
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers

import visionpulse as vp
from visionpulse.models import session_of
from visionpulse.models.config_text import config_from_text

SUPPRESSED = [150, 151, 152, 153]


@pytest.fixture
def saved(tiny, tmp_path):
    vlm = tiny("llava")
    vlm.model.save_pretrained(tmp_path / "model")
    return vlm, str(tmp_path / "model")


@pytest.fixture
def installed():
    vp.install("5pct")
    yield
    vp.uninstall()


def test_install_patches_what_from_pretrained_gives(saved):
    _, folder = saved
    before = transformers.PreTrainedModel.__dict__["from_pretrained"]
    vp.install("5pct")
    vp.install("5pct")
    with pytest.raises(ValueError, match="uninstall"):
        vp.install("10pct")
    auto = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert session_of(auto).config == vp.PRESETS["5pct"]
    own, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert session_of(own) is not None
    assert info["missing_keys"] == set() or not info["missing_keys"]
    vp.uninstall()
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is before
    assert session_of(transformers.LlavaForConditionalGeneration.from_pretrained(folder)) is None
    with pytest.warns(UserWarning, match="not installed"):
        vp.uninstall()


def test_install_leaves_text_models_alone(installed, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert session_of(model) is None
    assert model.config._attn_implementation == "sdpa"


PROGRAM = """
import sys, torch, transformers
folder, out = sys.argv[1:]
model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
inputs = torch.load(folder + "/inputs.pt")
torch.save(model.generate(**inputs, do_sample=False, max_new_tokens=6), out)
sys.exit(3)
"""


def test_run_patches_a_program_and_logs_what_it_kept(saved, tmp_path):
    vlm, folder = saved
    inputs = vlm.inputs() | {"suppress_tokens": SUPPRESSED}
    torch.save(inputs, f"{folder}/inputs.pt")
    script, log = tmp_path / "program.py", tmp_path / "log.jsonl"
    script.write_text(PROGRAM)
    start = "import sys; from visionpulse.cli.run import main; sys.exit(main(sys.argv[1:]))"
    options = ["--preset", "5pct", "--set", "tau=0.5", "--set", "ratio=0.05:0.4"]
    done = subprocess.run(
        [sys.executable, "-c", start, *options, "--log", str(log), "--", str(script), folder,
         str(tmp_path / "out.pt")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr  # the program's own
    assert "sparse decode steps" in done.stderr
    (line,) = [json.loads(text) for text in log.read_text().splitlines()]
    assert line["steps"] == 5
    assert line["program"] == str(script)
    assert 0 < line["retention"]["mean"] <= 0.4
    assert line["config"]["tau"] == 0.5
    with vp.patch(vlm.model, vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4))):
        expected = vlm.generate(vlm.inputs(), tokens=6)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_settings_are_read_from_text():
    text = {"ratio": "0.1:0.2", "anchor": "3:5", "tau": "0.3", "refresh": "4"}
    config = config_from_text("5pct", text)
    assert config == vp.PulseConfig(tau=0.3, ratio=(0.1, 0.2), anchor=(3, 5), refresh=4)
    assert config_from_text("10pct", {"anchor": 4, "score": "logit"}).anchor == 4
    with pytest.raises(ValueError, match="unknown setting rato"):
        config_from_text("5pct", {"rato": "0.1"})
    with pytest.raises(ValueError, match="joined by a colon"):
        config_from_text("5pct", {"ratio": "0.1-0.2"})


@dataclass(frozen=True)
class ModelManifest:
    """As lmms-eval 0.7.3 publishes it, in lmms_eval/models/registry_v2.py."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self):
        if self.simple_class_path is None and self.chat_class_path is None:
            raise ValueError(f"ModelManifest('{self.model_id}') requires at least one class path")


@pytest.fixture
def lmms_eval(monkeypatch, saved):
    """The published interface: registry, base class, and one wrapper that keeps self._model."""
    vlm, _ = saved

    class lmms:
        is_simple = True

    class LlavaHf(lmms):
        def __init__(self, pretrained="", batch_size=1, **kwargs):
            assert kwargs == {}, f"Unexpected kwargs: {kwargs}"
            self._model, self._rank = vlm.model, 0

        def generate_until(self, requests):
            return [vlm.generate(request.inputs) for request in requests]

    class ChatLlavaHf(LlavaHf):
        is_simple = False

    modules = {
        "lmms_eval": {},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.simple": {},
        "lmms_eval.models.chat": {},
        "lmms_eval.models.simple.llava_hf": {"LlavaHf": LlavaHf},
        "lmms_eval.models.chat.llava_hf": {"LlavaHf": ChatLlavaHf},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return lmms


def test_lmms_eval_plugin(lmms_eval, saved, tmp_path):
    import importlib

    from visionpulse.integrations import lmms_eval as plugin

    vlm, _ = saved
    manifests = {manifest.model_id: manifest for manifest in plugin.manifests()}
    wanted = {"visionpulse_qwen2_5_vl", "visionpulse_qwen3_vl", "visionpulse_llava_hf"}
    assert wanted | {"visionpulse_internvl_hf"} <= set(manifests)
    assert all(type(manifest) is ModelManifest for manifest in manifests.values())
    log = tmp_path / "retention.jsonl"
    request = types.SimpleNamespace(task_name="mmstar", inputs=vlm.inputs())
    for kind in ("simple", "chat"):
        path = getattr(manifests["visionpulse_llava_hf"], f"{kind}_class_path")
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        assert issubclass(cls, lmms_eval)
        assert cls.is_simple == (kind == "simple")
        model = cls(pretrained="x", vp_preset="5pct", vp_ratio="0.05:0.4", vp_log=str(log))
        assert model.visionpulse.config.ratio == (0.05, 0.4)
        assert len(model.generate_until([request])) == 1
    with pytest.raises(ValueError, match="unknown setting"):
        cls(vp_presett="5pct")
    with pytest.raises(AttributeError, match="no simple class"):
        plugin.simple_internvl_hf  # noqa: B018
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert [line["tasks"] for line in lines] == [["mmstar"]] * 2
    assert all(line["rows"] == 7 for line in lines)


def test_published_lmms_eval_takes_the_plugin():
    registry = pytest.importorskip("lmms_eval.models.registry_v2")
    from visionpulse.integrations import lmms_eval as plugin

    models = registry.ModelRegistryV2()
    for manifest in models._coerce_payload_to_manifests(plugin.manifests):
        models.register_manifest(manifest)
    resolved = models.resolve("visionpulse_qwen3_vl")
    assert resolved.class_path == "visionpulse.integrations.lmms_eval.chat_qwen3_vl"
