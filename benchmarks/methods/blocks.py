"""The published scheme of 64-token blocks over a model: `block64`'s step, layer by layer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionpulse import ops
from visionpulse.cache import KVCache
from visionpulse.calibration.method import Method, Run
from visionpulse.calibration.prompt import Prompt
from visionpulse.config import PulseConfig

from . import block64


@dataclass
class Blocks64(Method):
    """Dense up to the anchor and in it; followers attend to the kept blocks and to mixed ones."""

    config: PulseConfig
    anchor: int
    _blocks: block64.Blocks | None = field(default=None, init=False, repr=False)

    def prepare(self, run: Run) -> None:
        layers = len(run.parts.full)
        if not 0 <= self.anchor < layers:
            raise ValueError(f"anchor must be in 0..{layers - 1}, got {self.anchor}")

    def decode(self, prompt: Prompt, layer: int, q: Tensor, kv: KVCache, scale: float) -> Tensor:
        if layer < self.anchor:
            return ops.attend(q, kv, scale=scale)
        if layer == self.anchor:
            visual = prompt.visual_of(layer)
            out, self._blocks = block64.anchor(q, kv, visual, self.config)
            return out
        assert self._blocks is not None
        return block64.follower(q, kv, self._blocks)

    def kept(self, prompt: Prompt) -> Tensor:
        """Visual tokens in kept blocks, those of mixed blocks included."""
        assert self._blocks is not None
        size, block = prompt.visual.shape[1], block64.BLOCK
        counts = []
        for row, visual in zip(self._blocks.indices, prompt.visual, strict=True):
            slots = row[row >= 0, None] * block + torch.arange(block, device=row.device)
            counts.append(visual[slots[slots < size]].sum())
        return torch.stack(counts)
