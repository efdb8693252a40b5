"""Models of lmms-eval, patched: `--model visionpulse_qwen3_vl --model_args pretrained=...,vp_...`.

The entry point `lmms_eval.models` names `manifests`. Each class subclasses one of lmms-eval's, and
is made when lmms-eval asks for its name. Arguments that begin with `vp_` are settings, for example
`vp_preset=5pct`, `vp_tau=0.3`, `vp_ratio=0.05:0.10`; `vp_log` names the file that retention is
added to after every task. All others go to the harness's class.
"""

import importlib
from typing import Any

import visionpulse as vp

from ..models.config_text import config_from_text
from ..models.report import Report

PREFIX = "visionpulse_"
LOG = "visionpulse-retention.jsonl"

# our model id -> the class of lmms-eval, (simple, chat); "" where it has none
WRAPPED = {
    "qwen2_vl": ("simple.qwen2_vl.Qwen2_VL", ""),
    "qwen2_5_vl": ("simple.qwen2_5_vl.Qwen2_5_VL", "chat.qwen2_5_vl.Qwen2_5_VL"),
    "qwen3_vl": ("simple.qwen3_vl.Qwen3_VL", "chat.qwen3_vl.Qwen3_VL"),
    "llava_hf": ("simple.llava_hf.LlavaHf", "chat.llava_hf.LlavaHf"),
    "internvl_hf": ("", "chat.internvl_hf.InternVLHf"),
    "gemma3": ("simple.gemma3.Gemma3", ""),
    "huggingface": ("", "chat.huggingface.Huggingface"),
}


def manifests() -> list[Any]:
    """The models of this plugin, as lmms-eval takes them."""
    from lmms_eval.models.registry_v2 import ModelManifest

    made = []
    for name, (simple, chat) in WRAPPED.items():
        paths = {
            f"{kind}_class_path": f"{__name__}.{kind}_{name}"
            for kind, path in (("simple", simple), ("chat", chat))
            if path
        }
        made.append(ModelManifest(model_id=PREFIX + name, **paths))
    return made


def __getattr__(name: str) -> type:
    """Make `simple_<model>` or `chat_<model>` when it is asked for."""
    kind, _, model = name.partition("_")
    if kind not in ("simple", "chat") or model not in WRAPPED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = WRAPPED[model][kind == "chat"]
    if not path:
        raise AttributeError(f"lmms-eval has no {kind} class for {model!r}")
    module, _, base = path.rpartition(".")
    made = _patched(getattr(importlib.import_module(f"lmms_eval.models.{module}"), base))
    made.__name__ = made.__qualname__ = name
    globals()[name] = made
    return made


def _patched(base: Any) -> type:
    """The harness's class with a patched model."""

    class Patched(base):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            own = {k[3:]: kwargs.pop(k) for k in list(kwargs) if k.startswith("vp_")}
            preset, self._vp_log = own.pop("preset", "10pct"), own.pop("log", LOG)
            config = config_from_text(preset, own)
            super().__init__(**kwargs)
            self.visionpulse = vp.patch(self._model, config)

        def generate_until(self, requests: Any) -> Any:
            self.visionpulse.reset_stats()
            answers = super().generate_until(requests)
            tasks = sorted({str(getattr(r, "task_name", "")) for r in requests})
            rank = getattr(self, "_rank", 0)
            Report(self.visionpulse).append(self._vp_log, tasks=tasks, rank=rank)
            return answers

    return Patched
