"""What "lookback" keeps between steps, as buffers of one shape, for a compiled step.

In a compiled step the layers before the anchor always follow a selection. On a fresh step it holds
all visual tokens, which is dense attention; on the others it is what the last step kept. The choice
is made on the device, so one graph serves both.
"""

import torch
from torch import Tensor

from ..selection import Selection
from ..visual import VisualTokens


class LookBack:
    """The selection for the layers before the anchor, and the number of the step."""

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
        """Take the visual tokens of a new prompt; the next step is fresh."""
        mask = visual.mask(visual.size)  # [B, size]
        order = torch.where(mask, torch.arange(visual.size, device=mask.device), visual.size)
        order = order.sort(dim=1).values[:, : self.all.shape[1]]
        self.all.copy_(torch.where(order < visual.size, order, -1))
        self.visual_counts.copy_(visual.counts)
        self.restart()

    def restart(self) -> None:
        """Let the next step be fresh."""
        self.step.zero_()

    def take(self, rows: Tensor) -> None:
        """Reorder rows in place."""
        for buffer in (self.all, self.indices, self.visual_counts, self.counts):
            buffer.copy_(buffer[rows])

    def early(self, refresh: int) -> Selection:
        """The selection for the layers before the anchor."""
        fresh = self.step == 0
        if refresh:
            fresh = fresh | (self.step % refresh == 0)
        indices = torch.where(fresh, self.all, self.indices)
        counts = torch.where(fresh, self.visual_counts, self.counts)
        mass = torch.zeros_like(counts, dtype=torch.float32)  # followers never look at it
        return Selection(indices, counts, mass, mass, trusted=True)

    def keep(self, selection: Selection) -> None:
        """Take what the anchor kept in this step."""
        self.indices.narrow(1, 0, selection.indices.shape[1]).copy_(selection.indices)
        self.counts.copy_(selection.counts)
        self.step.add_(1)
