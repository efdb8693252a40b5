"""LOOK-M: cut every layer's cache once after prefill, text first, and merge what is dropped."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionpulse.calibration.method import Method, Run
from visionpulse.calibration.prompt import Prompt

from .evict import best, evict

_ROWS = 256  # queries per slice of the attention matrix


def received(q: Tensor, k: Tensor, causal: Tensor, scale: float) -> Tensor:
    """Attention that every key receives from all queries, summed per KV head: [B, G, N].

    q [B, H, N, D], k [B, G, N, D], causal bool [B, 1, N, N].
    """
    batch, heads, size, dim = q.shape
    groups = k.shape[1]
    total = torch.zeros(batch, groups, size, device=q.device)
    queries = q.float().reshape(batch, groups, heads // groups, size, dim)
    key_t = k.float().transpose(2, 3)[:, :, None]
    for row in range(0, size, _ROWS):
        z = scale * queries[..., row : row + _ROWS, :] @ key_t
        z = z.masked_fill(~causal[:, :, None, row : row + _ROWS], -torch.inf)
        total += z.softmax(-1).sum((2, 3))
    return total


def merge(states: Tensor, keep: Tensor, nearest: Tensor) -> Tensor:
    """Merge dropped entries into kept ones, `pivot` of the paper: states [N, D], keep bool [N].

    Each dropped entry is averaged with the kept one it is `nearest` to (a slot per dropped
    entry); a kept entry becomes the mean of itself and those averages.
    """
    sources = (states[~keep] + states[nearest]) / 2
    index = nearest[:, None].expand_as(sources)
    return states.scatter_reduce(0, index, sources, "mean", include_self=True)


@dataclass
class LookM(Method):
    """Keep a fixed share of the visual entries of each layer and KV head, and all of the text.

    Entries are ranked by the attention summed over all prompt queries. The original counts its
    ratio on the whole prompt and keeps a recent window of it; here the ratio is of the visual
    tokens, so that rows of a table compare, and text, the window with it, always stays.
    """

    ratio: float
    merging: bool = True
    _keep: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # [B, G, N]

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"LookM takes a ratio in (0, 1], got {self.ratio!r}")

    def prepare(self, run: Run) -> None:
        self._keep = {}

    def prefill(self, prompt: Prompt, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        seen = prompt.causal & prompt.present[:, None, :, None]  # padded queries do not vote
        seen = seen | torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        share = received(q, k, seen, scale)
        wanted = prompt.wanted(self.ratio)[:, None]
        chosen = best(share, prompt.visual[:, None], wanted)
        self._keep[layer] = chosen | (prompt.present & ~prompt.visual)[:, None]

    def after_prefill(self, prompt: Prompt, cache: Any) -> None:
        for layer, keep in self._keep.items():
            if self.merging:
                self._merge(cache.layers[layer], keep, prompt)
            evict(cache, layer, keep, prompt)

    def _merge(self, cached: Any, keep: Tensor, prompt: Prompt) -> None:
        """Merge in place, by the cosine of the cached keys."""
        for b, present in enumerate(prompt.present):
            slots = present.nonzero()[:, 0]
            for g in range(keep.shape[1]):
                kept = keep[b, g, slots]
                if bool(kept.all()):
                    continue
                k = cached.keys[b, g, slots]
                unit = F.normalize(k.float(), dim=-1)
                nearest = kept.nonzero()[:, 0][(unit[~kept] @ unit[kept].T).argmax(1)]
                cached.keys[b, g, slots] = merge(k, kept, nearest)
                cached.values[b, g, slots] = merge(cached.values[b, g, slots], kept, nearest)

    def kept(self, prompt: Prompt) -> Tensor:
        first = self._keep[min(self._keep)][:, 0]  # as many in every layer and head
        return torch.sum(first & prompt.visual, 1)
