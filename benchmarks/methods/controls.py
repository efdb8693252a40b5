"""Controls: what an answer is worth with no visual token, or with any."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionpulse import ops
from visionpulse.cache import KVCache
from visionpulse.calibration.method import Method, Run
from visionpulse.calibration.prompt import Prompt
from visionpulse.selection import Selection


def nothing(rows: int, device: torch.device) -> Selection:
    """A selection that keeps no visual token."""
    return Selection(
        torch.full((rows, 1), -1, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros(rows, device=device),
        torch.zeros(rows, device=device),
    )


@dataclass
class NoneAfter(Method):
    """Dense up to a layer, with itself, and text alone after it; -1 is text alone everywhere."""

    anchor: int

    def prepare(self, run: Run) -> None:
        layers = len(run.parts.full)
        if not -1 <= self.anchor < layers - 1:
            raise ValueError(f"anchor must be in -1..{layers - 2}, got {self.anchor}")

    def decode(self, prompt: Prompt, layer: int, q: Tensor, kv: KVCache, scale: float) -> Tensor:
        if layer <= self.anchor:
            return ops.attend(q, kv, scale=scale)
        visual = prompt.visual_of(layer)
        return ops.attend(q, kv, visual, nothing(len(q), q.device), scale=scale)

    def kept(self, prompt: Prompt) -> Tensor:
        return torch.zeros_like(prompt.counts)


@dataclass
class Blind(NoneAfter):
    """No layer sees a visual token in decode: what is left is what prefill put into the text."""

    anchor: int = -1


@dataclass
class RandomTokens(Method):
    """A fixed share of the visual tokens, drawn anew in every step; the ranking means nothing."""

    ratio: float
    anchor: int
    seed: int = 0
    _selection: Selection | None = field(default=None, init=False, repr=False)

    def prepare(self, run: Run) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"RandomTokens takes a ratio in (0, 1], got {self.ratio!r}")
        layers = len(run.parts.full)
        if not 0 <= self.anchor < layers:
            raise ValueError(f"anchor must be in 0..{layers - 1}, got {self.anchor}")
        self._generator = torch.Generator().manual_seed(self.seed)

    def _draw(self, prompt: Prompt) -> Selection:
        wanted = prompt.wanted(self.ratio)  # [B]
        lots = torch.rand(prompt.visual.shape, generator=self._generator).to(prompt.visual.device)
        size = int(wanted.max())
        order = lots.masked_fill(~prompt.visual, -1.0).argsort(1, descending=True)[:, :size]
        place = torch.arange(size, device=order.device)
        beyond = place >= wanted[:, None]
        last = prompt.visual.shape[1]
        order = order.masked_fill(beyond, last).sort(1).values
        indices = order.masked_fill(order == last, -1).to(torch.int32)
        mass = torch.zeros(len(wanted), device=order.device)
        return Selection(indices, wanted.to(torch.int32), mass, mass)

    def decode(self, prompt: Prompt, layer: int, q: Tensor, kv: KVCache, scale: float) -> Tensor:
        if layer < self.anchor:
            return ops.attend(q, kv, scale=scale)
        if layer == self.anchor:
            self._selection = self._draw(prompt)
        return ops.attend(q, kv, prompt.visual_of(layer), self._selection, scale=scale)

    def kept(self, prompt: Prompt) -> Tensor:
        return prompt.wanted(self.ratio)
