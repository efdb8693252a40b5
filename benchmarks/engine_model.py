"""A model for engines: the attention of Qwen3-VL-4B, the rest thin, its weights random.

So attention, and what an engine does around it, are what is timed.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "bench-engine"
HEADS, KV_HEADS, DIM = 32, 8, 128
SIDE = 32  # cells of a picture's side
PICTURE = SIDE**2  # visual tokens of a picture
TEXT = 256
STOCK = "vllm:stock"


def write(layers: int, hidden: int) -> Path:
    """The tiny model's architecture, in a form that vLLM loads."""
    sys.path.insert(0, str(ROOT / "examples" / "serving"))
    import tiny_model
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    raw = json.loads((tiny_model.main(FOLDER) / "config.json").read_text())
    raw["text_config"] |= {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": hidden,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
        "max_position_embeddings": 1 << 17,
    }  # fmt: skip
    raw["text_config"]["rope_parameters"]["mrope_section"] = [24, 20, 20]
    raw["vision_config"]["out_hidden_size"] = hidden
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**raw))
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    return FOLDER


def settings(layers: int) -> dict[str, dict | None]:
    """What the engines are asked for; the anchor lies where it does in 36 layers, in the middle."""
    anchor = {"anchor": layers // 2 - 1}
    return {
        STOCK: None,
        "vllm:keep-all": {"ratio": [1.0, 1.0]} | anchor,
        "vllm:paper": {"preset": "5pct"} | anchor,
        "vllm:lookback": {"preset": "5pct", "schedule": "lookback"} | anchor,
    }


def cache_gib(rows: int, longest: int, layers: int) -> int:
    """Memory for keys and values in bfloat16, and one GiB for what lies beside them."""
    return -(-rows * longest * layers * 2 * KV_HEADS * DIM * 2 >> 30) + 1
