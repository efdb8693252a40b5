"""The tiny model: Qwen3-VL of transformers, unchanged, from a small config."""

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from visionpulse.data import trail

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN = 6, 128, 4, 2, 64, 384


def config() -> Qwen3VLConfig:
    sixth = HEAD_DIM // 6
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=trail.VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=4096,
            pad_token_id=trail.PAD,
            bos_token_id=trail.BOS,
            eos_token_id=trail.END,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=500000.0,
                mrope_section=[HEAD_DIM // 2 - 2 * sixth, sixth, sixth],
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            depth=1,
            hidden_size=96,
            intermediate_size=192,
            num_heads=4,
            in_channels=3,
            patch_size=trail.CELL,
            spatial_merge_size=1,
            temporal_patch_size=1,
            out_hidden_size=WIDTH,
            num_position_embeddings=256,
            deepstack_visual_indexes=[],
        ),
        image_token_id=trail.IMAGE,
        video_token_id=trail.VIDEO,
        vision_start_token_id=trail.VISION_START,
        vision_end_token_id=trail.VISION_END,
        tie_word_embeddings=False,
    )


def make(seed: int) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    return Qwen3VLForConditionalGeneration(config())
