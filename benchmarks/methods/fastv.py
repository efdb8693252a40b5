"""FastV: after an early layer of the prefill, keep the visual tokens its last query looks at."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visionpulse import ops
from visionpulse.budgets import Fixed
from visionpulse.cache import KVCache
from visionpulse.calibration.method import Method, Run
from visionpulse.calibration.prompt import Prompt
from visionpulse.config import PulseConfig
from visionpulse.selection import Selection

from .evict import best, evict


def last_query_attention(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Head-mean attention of the last query to every key, [B, N].

    q [B, H, N, D], k [B, G, N, D], seen bool [B, N].
    """
    batch, dim = q.shape[0], q.shape[3]
    last = q[:, :, -1].float().reshape(batch, k.shape[1], -1, dim)
    z = scale * last @ k.float().transpose(2, 3)  # [B, G, R, N]
    share = z.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return share.flatten(1, 2).mean(1)


@dataclass
class FastV(Method):
    """Keep a fixed share of the visual tokens, ranked once, from layer `k` (counted from 1).

    The first `k` layers see everything; after the attention of the k-th, visual tokens are ranked
    by the head-mean attention of the last prompt token and the rest leave the later layers for
    good. `every_step` ranks again in every decode step instead, as the original code without a
    cache does: then nothing is evicted, and tokens already written keep the states they have.
    `then` prunes what FastV left by VisionPulse in each step; its anchor must not lie before `k`.
    """

    ratio: float
    k: int = 2
    every_step: bool = False
    then: PulseConfig | None = None
    _keep: Tensor | None = field(default=None, init=False, repr=False)  # bool [B, N]
    _selection: Selection | None = field(default=None, init=False, repr=False)
    _anchor: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"FastV takes a ratio in (0, 1], got {self.ratio!r}")
        if self.every_step and self.then is not None:
            raise ValueError("every_step keeps the whole cache; then= works on what FastV left")

    def prepare(self, run: Run) -> None:
        layers = len(run.parts.full)
        if not 1 <= self.k < layers:
            raise ValueError(f"k must be in 1..{layers - 1} for {layers} layers, got {self.k}")
        if self.then is not None:
            anchor = self.then.anchor
            if not isinstance(anchor, int) or not self.k <= anchor < layers:
                raise ValueError(
                    f"then= needs one anchor in {self.k}..{layers - 1}, got {anchor!r}; "
                    "layers before k still hold every token"
                )
            self._anchor = anchor
        elif self.every_step:
            self._anchor = self.k - 1
        self._ranking = PulseConfig(budget=Fixed(self.ratio), anchor_output="dense")

    def prefill(self, prompt: Prompt, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        if layer != self.k - 1:
            return
        share = last_query_attention(q, k, prompt.present, scale)
        chosen = best(share, prompt.visual, prompt.wanted(self.ratio))
        self._keep = chosen | (prompt.present & ~prompt.visual)

    def visible(self, prompt: Prompt, layer: int) -> Tensor | None:
        return self._keep if layer >= self.k else None

    def after_prefill(self, prompt: Prompt, cache: Any) -> None:
        if self.every_step:
            return
        assert self._keep is not None
        for layer in range(self.k, len(cache.layers)):
            evict(cache, layer, self._keep, prompt)

    def decode(self, prompt: Prompt, layer: int, q: Tensor, kv: KVCache, scale: float) -> Tensor:
        if layer < self._anchor or self._anchor < 0:
            return ops.attend(q, kv, scale=scale)
        visual = prompt.visual_of(layer)
        if layer == self._anchor:
            config = self.then or self._ranking
            out, self._selection = ops.decode(q, kv, visual, config, scale=scale)
            return out
        return ops.attend(q, kv, visual, self._selection, scale=scale)

    def kept(self, prompt: Prompt) -> Tensor:
        if self._selection is not None:
            return self._selection.counts
        assert self._keep is not None
        return torch.sum(self._keep & prompt.visual, 1)
