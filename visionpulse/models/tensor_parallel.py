"""Heads split over ranks: sums over heads are completed between score and select.

Each rank holds H / ranks query heads. The scores are a mean over heads and the mass a maximum or a
mean, so every rank gets the numbers of one process from all-reduces of [B, candidates] and of [B].
All ranks get the same bits, so they agree on K and on every index.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..cache import Cache
from ..config import PulseConfig
from ..selection import Selection
from ..visual import VisualTokens
from .families import attention_layers


class HeadGroup:
    """The process group over which the query heads of a model are split."""

    def __init__(self, group: Any, heads: int) -> None:
        self.group = group
        self.heads = heads  # of all ranks together

    def splits(self, q: Tensor) -> bool:
        """Whether `q` [.., H, D] holds only a part of the heads."""
        return q.shape[-2] < self.heads

    def decode(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens,
        config: PulseConfig,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[Tensor, Selection]:
        """Decode as if this rank held all heads; the output is of its own heads."""
        numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}
        scores, mass, mass_mean = ops.score(q, kv, visual, config, **numbers)
        share = q.shape[-2] / self.heads
        # all candidates lie before it; of tables that an engine writes no size is known
        size = scores.shape[-1]
        width = size if visual.is_borrowed else min(visual.size, size)
        shared = scores[..., :width] * share
        dist.all_reduce(shared, dist.ReduceOp.SUM, self.group)
        scores[..., :width] = shared
        mass_mean = mass_mean * share
        dist.all_reduce(mass_mean, dist.ReduceOp.SUM, self.group)
        dist.all_reduce(mass, dist.ReduceOp.MAX, self.group)
        # gloo and nccl may drop a NaN from a maximum; the mean keeps it, and both must carry it
        mass = torch.where(mass_mean.isnan(), mass_mean, mass)
        selection = ops.select(
            scores,
            mass,
            visual,
            config,
            mass_mean=mass_mean,
            starts=kv.starts,
            lengths=kv.lengths,
            backend=config.backend,
        )
        is_dense = config.anchor_output == "dense"
        pruned: tuple[Any, Any] = (None, None) if is_dense else (visual, selection)
        return ops.attend(q, kv, *pruned, backend=config.backend, **numbers), selection


def head_group(decoder: nn.Module) -> HeadGroup | None:
    """The group over which the decoder's query projections are split, or None."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    from torch.distributed.tensor import DTensor, Shard

    for layer in attention_layers(decoder):
        weight = getattr(getattr(layer, "q_proj", None), "weight", None)
        if isinstance(weight, DTensor) and Shard(0) in weight.placements:
            config: Any = layer.config
            return HeadGroup(weight.device_mesh.get_group(), config.num_attention_heads)
    return None
