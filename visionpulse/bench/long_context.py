"""The attention of one decode step of a large model over a long context, in a few seconds."""

from collections.abc import Callable

import torch

from ..config import PulseConfig
from ..layer_ops import LayerOps
from ..schedule import Role
from ..workspace import Workspace
from . import cost, torch_forms
from .layers import Layers, Shape
from .timing import interleaved

MODEL = "qwen3-vl-4b"
AS_CALLED, BEST_FORM = "torch, as transformers calls it", "torch, its best form"
EVERY_TOKEN, SPARSE = "our kernels, every token", "VisionPulse"


def step_seconds(config: PulseConfig, visual: int, rounds: int = 5) -> dict[str, float]:
    """Seconds of a step by form: all layers of `MODEL`, from the bests of cold layers.

    Keys are random, so the share kept is the largest that the config allows.
    """
    decoder = cost.decoder_of(MODEL)
    shape = Shape(
        "long", 1, visual, heads=decoder.heads, kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim, retention=config.ratio[1],
    )  # fmt: skip
    layers = Layers.make(shape, torch.bfloat16, layers=3, budget=1 << 29)
    exactly = config.updated(ratio=(shape.retention, shape.retention), anchor=None)
    tokens, workspace = layers.visual, Workspace()
    ops = LayerOps(*layers.at(0), tokens, exactly)  # as the layers of a patched model
    _, selection = ops.decode(*layers.at(0), tokens, workspace)
    variants: dict[str, Callable[[int], object]] = {
        AS_CALLED: lambda turn: torch_forms.per_head(*layers.at(turn)),
        BEST_FORM: lambda turn: torch_forms.grouped(*layers.at(turn)),
        "dense": lambda turn: ops.attend(*layers.at(turn), None, None, workspace),
        "anchor": lambda turn: ops.decode(*layers.at(turn), tokens, workspace),
        "follower": lambda turn: ops.attend(*layers.at(turn), tokens, selection, workspace),
    }
    taken = {name: times.best for name, times in interleaved(variants, rounds).items()}
    counts = cost.role_counts(config, decoder.is_full)
    roles = {"dense": Role.DENSE, "anchor": Role.ANCHOR, "follower": Role.FOLLOWER}
    return {
        AS_CALLED: decoder.layers * taken[AS_CALLED],
        BEST_FORM: decoder.layers * taken[BEST_FORM],
        EVERY_TOKEN: decoder.layers * taken["dense"],
        SPARSE: sum(counts[role] * taken[name] for name, role in roles.items()),
    }
