"""An EAGLE-3 drafter of random weights for the tiny model: its drafts are mostly wrong.

A draft may cost time and change nothing, so a wrong one tests more than a right one.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[2] / "build" / "tiny-eagle"
CONFIG = {"method": "eagle3", "model": str(FOLDER), "num_speculative_tokens": 2}
AFTER = [1, 2, 4]  # layers of the target whose outputs it reads


def write(model: Path) -> None:
    """For the model whose config is in a folder."""
    text = json.loads((model / "config.json").read_text())["text_config"]
    width, words, inner = text["hidden_size"], text["vocab_size"], 128
    heads, kv_heads, dim = (
        text[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    random = torch.Generator().manual_seed(0)
    shapes = {
        "fc": (width, len(AFTER) * width), "lm_head": (words, width),
        "midlayer.self_attn.q_proj": (heads * dim, 2 * width),
        "midlayer.self_attn.k_proj": (kv_heads * dim, 2 * width),
        "midlayer.self_attn.v_proj": (kv_heads * dim, 2 * width),
        "midlayer.self_attn.o_proj": (width, heads * dim),
        "midlayer.mlp.gate_proj": (inner, width), "midlayer.mlp.up_proj": (inner, width),
        "midlayer.mlp.down_proj": (width, inner),
    }  # fmt: skip
    tensors = {
        f"{name}.weight": 0.1 * torch.randn(shape, generator=random)
        for name, shape in shapes.items()
    }
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    for name in ("norm", *(f"midlayer.{norm}" for norm in norms)):
        tensors[f"{name}.weight"] = torch.ones(width)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama",
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
        "vocab_size": words, "draft_vocab_size": words, "rms_norm_eps": 1e-6,
        "max_position_embeddings": text["max_position_embeddings"], "torch_dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": AFTER,
    }  # fmt: skip
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(FOLDER / "model.safetensors"))
