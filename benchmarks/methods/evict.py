"""Which visual tokens a method keeps, and a cache cut to them."""

from typing import Any

import torch
from torch import Tensor

from visionpulse.calibration.prompt import Prompt
from visionpulse.visual import VisualTokens


def best(scores: Tensor, candidates: Tensor, wanted: Tensor) -> Tensor:
    """The `wanted` candidates with the largest scores; ties to the lowest: bool [..., N].

    scores [..., N]; candidates bool, wanted int, of shapes that broadcast to it.
    """
    ranked = scores.masked_fill(~candidates, -torch.inf)
    order = ranked.argsort(stable=True, dim=-1, descending=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return (rank < wanted[..., None]) & candidates


def evict(cache: Any, layer: int, keep: Tensor, prompt: Prompt) -> None:
    """Cut a layer's cache to `keep`, bool [B, N] or [B, G, N], one count per row for all heads.

    Rows that keep fewer are padded in front; the layer goes on counting positions as before.
    """
    cached = cache.layers[layer]
    keys, values = cached.keys, cached.values  # [B, G, N, D]
    per_head = keep if keep.dim() == 3 else keep[:, None].expand(-1, keys.shape[1], -1)
    counts = per_head.sum(-1)  # [B, G]
    size = int(counts.max())
    # a stable sort of the flags puts the kept slots last, in their order
    order = per_head.to(torch.int8).argsort(stable=True, dim=-1)[..., -size:]
    index = order[..., None].expand(-1, -1, -1, keys.shape[-1])
    dropped = keys.shape[2] - size
    cached.keys = keys.gather(2, index)
    cached.values = values.gather(2, index)
    _count_on(cached, dropped)
    prompt.starts[layer] = (size - counts[:, 0]).to(torch.int32)
    if keep.dim() == 2:
        flags = (prompt.visual & keep).gather(1, order[:, 0])
        prompt.remaining[layer] = VisualTokens.from_mask(flags)


def _count_on(cached: Any, dropped: int) -> None:
    """Make a cache layer report the length it would have: positions come from it."""
    kind = type(cached)

    class Evicted(kind):  # type: ignore[misc, valid-type]
        def get_seq_length(self) -> int:
            """The tokens seen, evicted ones included."""
            return int(super().get_seq_length()) + dropped

    Evicted.__name__ = f"Evicted{kind.__name__}"
    cached.__class__ = Evicted
