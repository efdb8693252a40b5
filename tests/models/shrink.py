"""Make the default config of any model type tiny: widths by name, layers in their pattern."""

from typing import Any

IMAGE, VIDEO, VOCABULARY = 150, 151, 200
HEAD, LAYERS, WIDTH = 16, 6, 64  # 4 heads, 2 of them with keys

# Every width that meets another is the same, so that projections between parts fit.
WIDTHS = (
    "hidden_size", "embed_dim", "d_model", "dim", "out_hidden_size", "output_dim",
    "text_hidden_size", "projection_dim", "projector_hidden_size", "vision_output_dim",
    "encoder_hidden_size", "cross_attention_hidden_size", "proj_out_dim", "vision_hidden_size",
)  # fmt: skip
SIZES: dict[str, int] = dict.fromkeys(WIDTHS, WIDTH) | {
    "vocab_size": VOCABULARY, "head_dim": HEAD, "global_head_dim": HEAD, "swa_head_dim": HEAD,
    "num_attention_heads": 4, "num_heads": 4, "attention_heads": 4, "num_attention_groups": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "projector_input_dim": WIDTH, "projector_output_dim": WIDTH,
    "alignment_intermediate_size": 96, "base_channels": 32, "codebook_dim": WIDTH,
    "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH, "adapter_input_size": WIDTH,
    "num_embeddings": 64, "rel_extent": 32, "projection_intermediate_size": 96,
    "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": HEAD,
    "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
    "laurel_rank": 8, "decoder_ffn_dim": 96, "decoder_attention_heads": 4, "d_ff": 96, "d_kv":
    HEAD, "num_key_value_heads": 2, "num_global_key_value_heads": 2, "intermediate_size": 96,
    "ffn_dim": 96, "moe_intermediate_size": 32, "mlp_dim": 96,
    "shared_expert_intermediate_size": 32, "expert_intermediate_size": 32,
    "intermediate_size_mlp": 96, "num_experts": 4, "n_routed_experts": 4, "num_local_experts":
    4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2,
    "top_k_experts": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "linear_key_head_dim": HEAD, "linear_value_head_dim": HEAD, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "image_size": 64, "patch_size": 8, "num_position_embeddings":
    64, "window_size": 16, "max_position_embeddings": 2048, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY, "query_pre_attn_scalar": HEAD,
}  # fmt: skip
SIZED = {"head_dim": HEAD}  # of layers that differ
DROPPED = ("id2label", "label2id", "transformers_version", "dtype", "architectures")
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers")


def _text(**settings: Any) -> dict[str, Any]:
    return {"text_config": settings}


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*section]} | more
    return _text(rope_parameters=rope)


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(settings[name], value)
        for name, value in changes.items()
        if isinstance(value, dict) and isinstance(settings.get(name), dict)
        and name != "rope_parameters"
    }  # fmt: skip
    return settings | changes | both


_PER_KIND = {
    kind: {"rope_type": "default", "rope_theta": 1e4}
    for kind in ("full_attention", "sliding_attention")
}
# stands in for a tower of the package timm; placeholder tokens never reach it
_TOWER = {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 4}}
# What a type lacks by default, or cannot have small by these rules.
SETTINGS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 40,
        "vision_config": {"codebook_size": 4},
        "audio_token_offset": 44,
        "audio_config": {"codebook_size": 4},
    },
    "chameleon": {"vocabulary_map": {"<image>": IMAGE}},
    "cohere_compass": _text(
        rope_parameters={
            kind: rope | {"mrope_section": [2, 3, 3]} for kind, rope in _PER_KIND.items()
        }
    ),
    "deepseek_ocr2": _text(mlp_layer_types=["dense"] + ["sparse"] * 5, num_experts_per_tok=2),
    "diffusion_gemma": _text(
        num_experts=4, num_experts_per_tok=2, top_k_experts=2, moe_intermediate_size=32
    )
    | {"vision_config": {"model_type": "gemma4_vision"}},
    "emu3": {"vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 199}},
    "ernie4_5_vl_moe": _mrope(2, 2, 4),
    "fast_vlm": _TOWER,
    "dots3_note": _text(num_key_value_heads=4),
    "hy_v4_vl": _mrope(1, 1, 2),
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "perception_lm": {
        "vision_config": _TOWER["vision_config"] | {"model_args": {"embed_dim": WIDTH}}
    },
    "glm46v": _mrope(2, 3, 3),
    "glm4v_moe": _mrope(1, 1, 2, partial_rotary_factor=0.5),
    "glm5_next": _text(num_key_value_heads=4, qk_rope_head_dim=0, head_dim=0),
    "glm_ocr": _mrope(2, 3, 3),
    "glmga": _mrope(2, 3, 3),
    "kimi_k25": _text(head_dim=8, num_key_value_heads=4),
    "granite4_vision": _text(model_type="granite4_vision_text")
    | {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
    },
    "hunyuan_vl": _merged(_mrope(2, 2, 2, 2), _text(head_dim=HEAD)),
    "paddleocr_vl": _mrope(2, 3, 3),
    "qwen2_5_omni_thinker": _mrope(2, 3, 3) | {"vision_start_token_id": 198},
    "qwen3_omni_moe_thinker": _mrope(2, 3, 3) | {"vision_start_token_id": 198},
    "qwen4_exp": _text(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=HEAD,
        indexer_budget=16,
        indexer_compress_ratio=4,
    ),
    "step3p7": _text(sliding_window=16),
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}},
}


def shrunk(kind: str) -> Any:
    """A tiny config of a model type."""
    from transformers import AutoConfig

    needed = SETTINGS.get(kind, {}) if kind == "vision-encoder-decoder" else {}
    settings = _part(AutoConfig.for_model(kind, **needed).to_dict(), is_text=False, depth=LAYERS)
    settings = _merged(_with_ids(settings), SETTINGS.get(kind, {}))
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _part(settings: dict[str, Any], *, is_text: bool, depth: int) -> dict[str, Any]:
    """One config with those inside it; `depth` layers, more where the text needs its pattern."""
    made: dict[str, Any] = {}
    before = next((settings[name] for name in DEPTHS if isinstance(settings.get(name), int)), 0)
    kinds = settings.get("layer_types")
    if is_text:
        depth = _pattern(kinds) if kinds else LAYERS
    for name, value in settings.items():
        if name in DROPPED:
            continue
        if name == "per_layer_config":
            made[name] = {at: SIZED for at in value if int(at) < depth}
            continue
        if (
            isinstance(value, dict)
            and all(isinstance(key, str) for key in value)
            and (name not in ("rope_parameters", "rope_scaling"))
        ):
            made[name] = _part(value, is_text="text" in name or "llm" in name, depth=2)
        elif name in DEPTHS and isinstance(value, int):
            made[name] = depth
        elif name in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            made[name] = min(value, SIZES[name]) if name == "patch_size" else SIZES[name]
        elif name in SIZES and isinstance(value, list):
            made[name] = [SIZES[name]] * (depth if len(value) == before else len(value))
        elif name == "num_kv_shared_layers":
            made[name] = min(value, 2)
        elif isinstance(value, list) and before and len(value) == before:
            made[name] = value[:depth]
        elif "sliding_window" in name and isinstance(value, int) and not isinstance(value, bool):
            made[name] = 16
        else:
            made[name] = value
    _rope(made)
    return made


def _pattern(kinds: list[str]) -> int:
    """As many layers as hold two full ones."""
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    return max(LAYERS, full[1] + 1) if len(full) > 1 else LAYERS


def _rope(settings: dict[str, Any]) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        rope = settings.get(name)
        for one in [rope, *(rope.values() if isinstance(rope, dict) else ())]:
            if isinstance(one, dict) and isinstance(section := one.get("mrope_section"), list):
                rotary = int(HEAD * one.get("partial_rotary_factor", 1.0)) // 2
                share = [max(1, part * rotary // sum(section)) for part in section]
                one["mrope_section"] = [*share[:-1], rotary - sum(share[:-1])]


def _with_ids(settings: dict[str, Any]) -> dict[str, Any]:
    """Token ids within the vocabulary, the picture's and the video's apart from all others."""
    taken = iter(range(152, VOCABULARY))
    for name, value in list(settings.items()):
        if isinstance(value, dict):
            settings[name] = _with_ids(value)
        elif isinstance(name, str) and name.endswith(("_token_id", "_token_index")):
            if name.startswith(("image_token", "video_token")):
                settings[name] = IMAGE if name.startswith("image") else VIDEO
            elif name.startswith(("pad", "eos", "bos")):
                settings[name] = {"pad": 0, "bos": 1, "eos": None}[name[:3]]
            elif isinstance(value, int):
                settings[name] = next(taken)
        elif isinstance(name, str) and name.endswith("_id") and isinstance(value, int):
            settings[name] = value if value < VOCABULARY else next(taken)
    return settings
