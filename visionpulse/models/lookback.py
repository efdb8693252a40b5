"""The selection of the last step, in buffers of one shape, for a compiled lookback.

In a compiled step the layers before the anchor always follow a selection: in a refresh, all visual
tokens, which is dense attention, else what the last step selected. The device decides which, so one
graph serves both.
"""

import torch
from torch import Tensor

from ..selection import Selection
from ..visual import VisualTokens


class LookBack:
    """The buffers: two selections, of all visual tokens and of the last step, and the step."""

    def __init__(self, visual: VisualTokens) -> None:
        shape, device = (visual.batch, visual.max_count), visual.device
        with torch.inference_mode(False):
            self.all = torch.full(shape, -1, dtype=torch.int32, device=device)
            self.indices = torch.full_like(self.all, -1)
            self.visual_counts = torch.zeros(shape[0], dtype=torch.int32, device=device)
            self.counts = torch.zeros_like(self.visual_counts)
            self.step = torch.zeros((), dtype=torch.int64, device=device)
        for buffer in vars(self).values():
            torch._dynamo.mark_static_address(buffer)  # written in place by a graph
        self.load(visual)

    def fits(self, visual: VisualTokens) -> bool:
        """Whether the buffers serve this set too."""
        return tuple(self.all.shape) == (visual.batch, visual.max_count)

    def load(self, visual: VisualTokens) -> None:
        """Take the visual tokens of a new prompt; the next step is a refresh."""
        mask = visual.mask(visual.size)  # [B, size]
        order = torch.where(mask, torch.arange(visual.size, device=mask.device), visual.size)
        order = order.sort(dim=1).values[:, : self.all.shape[1]]
        self.all.copy_(torch.where(order < visual.size, order, -1))
        self.visual_counts.copy_(visual.counts)
        self.restart()

    def restart(self) -> None:
        """Let the next step be a refresh."""
        self.step.zero_()

    def kept(self) -> tuple[Tensor, ...]:
        """Copies of what a step writes."""
        return self.indices.clone(), self.counts.clone(), self.step.clone()

    def put_back(self, kept: tuple[Tensor, ...]) -> None:
        """Take what `kept` gave."""
        own = self.indices, self.counts, self.step
        for buffer, value in zip(own, kept, strict=True):
            buffer.copy_(value)

    def take(self, rows: Tensor) -> None:
        """Reorder rows in place."""
        for buffer in (self.all, self.indices, self.visual_counts, self.counts):
            buffer.copy_(buffer[rows])

    def selection(self, refresh: int) -> Selection:
        """The selection for the layers before the anchor, refreshed every `refresh` steps."""
        refreshes = self.step == 0
        if refresh:
            refreshes = refreshes | (self.step % refresh == 0)
        indices = torch.where(refreshes, self.all, self.indices)
        counts = torch.where(refreshes, self.visual_counts, self.counts)
        mass = torch.zeros_like(counts, dtype=torch.float32)  # followers never look at it
        return Selection(indices, counts, mass, mass, trusted=True)

    def keep(self, selection: Selection) -> None:
        """Take the anchor's selection in this step."""
        self.indices.narrow(1, 0, selection.indices.shape[1]).copy_(selection.indices)
        self.counts.copy_(selection.counts)
        self.step.add_(1)
