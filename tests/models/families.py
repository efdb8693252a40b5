"""Tiny configs of every family, and what pictures are to each; loaded by conftest.py."""

import functools

import torch

IMAGE, VIDEO, START, END, PAD = 150, 151, 152, 153, 0
SUPPRESSED = [IMAGE, VIDEO, START, END]
CONV = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CLIP = {"model_type": "clip_vision_model", "num_attention_heads": 2, "image_size": 32} | CONV
SIGLIP = {"model_type": "siglip_vision_model", "num_attention_heads": 2, "image_size": 32} | CONV
PIXTRAL = {"model_type": "pixtral", "num_attention_heads": 2, "image_size": 64} | CONV
LLAMA = {"model_type": "llama"} | TEXT
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
QWEN3_VISION = QWEN_VISION | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 3


def _square(draws, n, size=32):
    return {"pixel_values": draws.normal(n, 3, size, size)}


def _patched(draws, n):
    # a base view and one tile of the same size
    return {
        "pixel_values": draws.normal(n, 2, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]] * n),
    }


def _sized(draws, n):
    return {
        "pixel_values": draws.normal(n, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]] * n),
    }


def _grid(draws, n):
    return {
        "pixel_values": draws.normal(n * 64, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * n),
    }


def _tiled(draws, n):
    return _square(draws, n)


# model type -> (config, what n pictures are, tokens of one picture)
FAMILIES = {
    "qwen2_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "qwen2_5_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION
            | {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "qwen3_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]},
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "qwen3_vl_moe": (
        {
            "text_config": TEXT
            | {
                "rope_parameters": MROPE,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "decoder_sparse_step": 1,
            },
            "vision_config": QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]},
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "qwen3_5": (
        {
            "text_config": TEXT
            | {
                "num_hidden_layers": 8,
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
                "rope_parameters": MROPE
                | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
            },
            "vision_config": QWEN3_VISION,
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "llava": (
        {
            "text_config": LLAMA,
            "vision_config": CLIP | {"patch_size": 8},
            "image_token_index": IMAGE,
        },
        _square,
        16,
    ),
    "llava_next": (
        {
            "text_config": LLAMA,
            "vision_config": CLIP | {"patch_size": 8},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[32, 32]],
        },
        _patched,
        36,
    ),
    "llava_next_video": (
        {
            "text_config": LLAMA,
            "vision_config": CLIP | {"patch_size": 8},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[32, 32]],
        },
        _patched,
        36,
    ),
    "llava_onevision": (
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "vision_config": SIGLIP | {"patch_size": 8, "vision_use_head": False},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[32, 32]],
        },
        _patched,
        36,
    ),
    "internvl": (
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "vision_config": CONV
            | {"num_attention_heads": 2, "image_size": [64, 64], "patch_size": [8, 8]},
            "image_token_id": IMAGE,
            "image_seq_length": 16,
        },
        functools.partial(_square, size=64),
        16,
    ),
    "gemma3": (
        {
            "text_config": TEXT
            | {"layer_types": ALTERNATING, "sliding_window": 16, "query_pre_attn_scalar": 16},
            "vision_config": SIGLIP | {"image_size": 64, "patch_size": 8, "vision_use_head": False},
            "mm_tokens_per_image": 16,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        functools.partial(_square, size=64),
        16,
    ),
    "mistral3": (
        {
            "text_config": LLAMA | {"model_type": "mistral", "sliding_window": None},
            "vision_config": PIXTRAL | {"patch_size": 4},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        _sized,
        16,
    ),
    "pixtral": (
        {
            "text_config": LLAMA | {"model_type": "mistral", "sliding_window": None},
            "vision_config": PIXTRAL | {"patch_size": 8},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        _sized,
        16,
    ),
    "smolvlm": (
        {
            "text_config": LLAMA,
            "vision_config": CONV | {"num_attention_heads": 2, "image_size": 32, "patch_size": 4},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
        _tiled,
        16,
    ),
    "idefics3": (
        {
            "text_config": LLAMA,
            "vision_config": CONV | {"num_attention_heads": 2, "image_size": 32, "patch_size": 4},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
        _tiled,
        16,
    ),
    "paligemma": (
        {
            "text_config": LLAMA | {"model_type": "gemma"},
            "vision_config": SIGLIP | {"patch_size": 8, "projection_dim": 64},
            "image_token_index": IMAGE,
            "projection_dim": 64,
            "hidden_size": 64,
        },
        _square,
        16,
    ),
    "glm4v": (
        {
            "text_config": TEXT
            | {
                "rope_parameters": MROPE
                | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
            },
            "vision_config": QWEN_VISION
            | {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "image_size": 32,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": 154,
            "video_end_token_id": 155,
        },
        _grid,
        16,
    ),
    "aya_vision": (
        {
            "text_config": LLAMA
            | {"model_type": "cohere2", "layer_types": ALTERNATING, "sliding_window": 16},
            "vision_config": SIGLIP | {"patch_size": 4, "vision_use_head": False},
            "image_token_index": IMAGE,
            "downsample_factor": 2,
        },
        _square,
        16,
    ),
}
