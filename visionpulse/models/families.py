"""What differs between model families, as a table, and the parts of a model that patching needs.

All else is one generic path.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

VISUAL_IDS = ("image_token_id", "video_token_id")  # config attributes; audio never counts


class UnsupportedModelError(ValueError):
    """The model cannot be patched; the text says why, and what can be done."""


@dataclass(frozen=True)
class Family:
    """The exceptions of one model type."""

    ids: tuple[str, ...] = VISUAL_IDS
    inner: str | None = None  # the part to patch, where it is not the model itself
    refused: str | None = None  # why it cannot be patched


_CROSS = "its picture is read by cross-attention, so the cache holds no visual tokens"
_SEPARATE = "its decoder reads the picture through an encoder; there is no visual key to prune"
_PREFIX = (
    "its picture is put before the text as embeddings, handed to an inner model by generate(): "
    "no token says where the visual keys are"
)
_MASKED = "a mask of the processor says where its picture is, no token id does"

# A family without an exception needs no row.
FAMILIES: dict[str, Family] = {
    "mllama": Family(refused=_CROSS),
    "blip": Family(refused=_CROSS),
    "evolla": Family(refused=_CROSS),
    "blip-2": Family(refused=_PREFIX),
    "instructblip": Family(refused=_PREFIX),
    "instructblipvideo": Family(refused=_PREFIX),
    "git": Family(refused=_PREFIX),
    "kosmos-2": Family(refused=_MASKED),
    "kosmos-2.5": Family(refused=_MASKED),
    "diffusion_gemma": Family(
        refused="it fills blocks of tokens by diffusion, so it has no step that decodes one token"
    ),
    "pi0": Family(refused="it decodes actions, not tokens"),
    "idefics": Family(refused=_CROSS),
    "florence2": Family(refused=_SEPARATE),
    "t5gemma2": Family(refused=_SEPARATE),
    "qwen2_5_omni": Family(inner="thinker"),
    "qwen3_omni_moe": Family(inner="thinker"),
}

# Families of the test matrix: every situation is run on each of them.
TESTED = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "internvl",
    "gemma3",
    "mistral3",
    "pixtral",
    "smolvlm",
    "idefics3",
    "paligemma",
    "glm4v",
    "aya_vision",
)

# Published models, and the anchor of their published figures.
PUBLISHED = {
    "Qwen3-VL-4B": 17,
    "Qwen3-VL-8B": 17,
    "InternVL3_5-4B": 17,
    "InternVL3_5-8B": 17,
}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a model that patching needs."""

    model: Any  # what was unwrapped
    base: Any  # sees input_ids
    decoder: Any  # the text decoder, sees the cache
    config: Any  # of the decoder
    full: tuple[bool, ...]  # which layers have full attention
    visual_ids: tuple[int, ...]
    published: int | None  # the anchor of a published model
    dense_because: str | None  # why no layer can be pruned although the model is supported

    @property
    def first_full(self) -> int:
        """The first full-attention layer: its cache layer carries what belongs to a cache."""
        return self.full.index(True)


def unwrap(model: Any) -> Any:
    """Take PEFT, DDP and compiled wrappers off."""
    for _ in range(8):  # wrappers nest, but not for ever
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            break
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} holds a model and is none; pass its .model, then use the "
            "pipeline as before"
        )
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"expected a model of transformers, got {type(model).__name__}; "
            "load it with from_pretrained of a class of transformers"
        )
    return model


def anatomy(model: Any) -> Anatomy:
    """Find the parts of a model, or refuse it with the reason."""
    model = unwrap(model)
    kind = getattr(model.config, "model_type", type(model).__name__)
    family = FAMILIES.get(kind, Family())
    if family.refused:
        raise UnsupportedModelError(f"{kind} cannot be pruned: {family.refused}")
    if type(model).__module__.split(".")[0] == "transformers_modules":
        raise UnsupportedModelError(
            f"{type(model).__name__} runs remote code, which has no attention interface; "
            "load the transformers port of it, without trust_remote_code "
            "(InternVL: the checkpoints whose name ends in -HF)"
        )
    if family.inner and hasattr(model, family.inner):
        model = getattr(model, family.inner)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} cannot be pruned: {_SEPARATE}")
    ids = _visual_ids(model, family)
    if not ids:
        raise UnsupportedModelError(
            f"{kind} names no visual token: its config has none of {', '.join(family.ids)}; if its "
            "picture is a run of one placeholder token, set model.config.image_token_id to that "
            "token's id; a text model has nothing to prune"
        )
    decoder, config = _decoder(model, kind)
    if config._attn_implementation == "flex_attention":
        raise UnsupportedModelError(
            "flex attention keeps its mask as blocks, from which no row can be cut; "
            "call model.set_attn_implementation('sdpa') first"
        )
    full = _full_layers(config)
    if not any(full):
        raise UnsupportedModelError(
            f"{kind} has no full-attention layer to prune: {_kinds(config)}"
        )
    if any(hasattr(layer, "kv_lora_rank") for layer in attention_layers(decoder)):
        raise UnsupportedModelError(
            f"{kind} has no full-attention layer to prune: its layers have latent attention, "
            "whose keys and values differ in width"
        )
    base = getattr(model, "base_model", model)
    return Anatomy(
        model, base, decoder, config, full, ids, _published(model, full), _dense_because(decoder)
    )


def _decoder(model: Any, kind: str) -> tuple[Any, Any]:
    if not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{kind} has no get_decoder(), so its text decoder is unknown")
    decoder = model.get_decoder()
    config = getattr(decoder, "config", None)
    if not hasattr(config, "num_hidden_layers"):
        raise UnsupportedModelError(
            f"the decoder of {kind} ({type(decoder).__name__}) has no config with num_hidden_layers"
        )
    modules = [sys.modules.get(type(layer).__module__) for layer in attention_layers(decoder)]
    if not modules or not all(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in modules):
        raise UnsupportedModelError(
            f"{kind} does not use the attention interface of transformers in its decoder "
            f"({type(decoder).__name__}); a port that does can be patched"
        )
    return decoder, config


def attention_layers(decoder: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a decoder, in the order of its layers."""
    layers = [
        module
        for module in decoder.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "scaling")
    ]
    return sorted(layers, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]


def _visual_ids(model: Any, family: Family) -> tuple[int, ...]:
    ids = (getattr(model.config, name, None) for name in family.ids)
    return tuple(dict.fromkeys(int(i) for i in ids if isinstance(i, int)))


def _full_layers(config: Any) -> tuple[bool, ...]:
    """Full attention by `layer_types`; without that list, where no window and no chunk is set."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return tuple(kind == "full_attention" for kind in kinds)
    cut = ("sliding_window", "attention_chunk_size")
    is_full = all(getattr(config, name, None) is None for name in cut)
    return (is_full,) * int(config.num_hidden_layers)


def _kinds(config: Any) -> str:
    """What the layers of a decoder without full attention are; the way out if there is one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return f"its layers are {', '.join(sorted(set(map(str, kinds))))}"
    if (window := getattr(config, "sliding_window", None)) is not None:
        return (
            f"each slides a window of {window}; where no context is longer, "
            "set sliding_window = None in the config of its decoder before the model is made: "
            "the same attention, over a cache that keeps everything"
        )
    return f"each attends within chunks of {config.attention_chunk_size}"


def _dense_because(decoder: nn.Module) -> str | None:
    for layer in attention_layers(decoder):
        if getattr(layer, "sinks", None) is not None:
            return "its attention has sinks, which the ops do not take yet"
    return None


def _published(model: Any, full: tuple[bool, ...]) -> int | None:
    name = getattr(model.config, "name_or_path", "") or ""
    anchors = (anchor for part, anchor in PUBLISHED.items() if part in name)
    return next((anchor for anchor in anchors if anchor < len(full) and full[anchor]), None)
