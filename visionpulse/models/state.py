"""What belongs to one conversation: its visual tokens and the selection that was kept."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..selection import Selection
from ..visual import VisualTokens
from .lookback import LookBack
from .notices import DenseReason


@dataclass
class CacheState:
    """Carried by a cache, copied, cut and reordered with it."""

    name: int = 0  # of the conversation, in a trace
    visual: VisualTokens | None = None  # None: no row has a visual token
    inverse: Tensor | None = None  # float32 [B], 1 / N_v, and 0 for rows without visual tokens
    model_path: bool = False  # rows have hidden keys in the middle: the model's attention only
    capacity: int | None = None  # slots of a static cache, whose set keeps one shape for its graph
    needs_mask: bool = False  # a static cache: without a mask its empty slots would be keys
    has_picture: bool = False  # whether some row had a visual token at the last prefill or crop
    blind: DenseReason | None = None  # why its pictures are unknown
    steps: int = 0  # decode steps since the last prefill or crop
    kept: Selection | None = None  # of the previous step, for the schedule that looks back
    kept_by: object = field(default=None, repr=False)  # the plan that made `kept`

    window: LookBack | None = None  # the same for a compiled step, with a static cache

    def see(self, visual: VisualTokens | None) -> None:
        """Take a new visual set; the steps start anew."""
        self.visual = visual
        self.inverse = None
        self.has_picture = visual is not None and bool((visual.counts > 0).any())
        if visual is not None:
            n = visual.counts
            self.inverse = torch.where(n > 0, 1.0 / n.clamp(min=1), 0.0)
        self.restart()

    def restart(self) -> None:
        """Forget the previous step: after a prefill or a crop nothing is kept."""
        self.steps, self.kept, self.kept_by = 0, None, None
        if self.window is not None:
            self.window.restart()

    def look_back(self, spare: LookBack | None) -> None:
        """Make buffers for a compiled lookback, or take those of the cache's last conversation."""
        if self.visual is None:
            return
        spare = self.window or spare
        if spare is not None and spare.fits(self.visual):
            spare.load(self.visual)
            self.window = spare
        else:
            self.window = LookBack(self.visual)

    def crop(self, length: int) -> None:
        """Cut to the first `length` tokens."""
        if self.visual is not None and self.visual.size > length:
            if self.capacity is not None:
                mask = self.visual.mask(self.capacity)
                mask[:, length:] = False
                self.see(visual_of(mask, self.capacity))
            else:
                self.see(visual_of(self.visual.mask(length), None) if length else None)
            if self.window is not None:
                self.look_back(None)  # its buffers name tokens that are gone
        self.restart()

    def take(self, rows: Tensor) -> None:
        """Reorder or select rows."""
        if self.visual is not None:
            rows = rows.to(self.visual.device)
            self.visual = self.visual.rows(rows)
            self.inverse = self.inverse[rows] if self.inverse is not None else None
        if self.kept is not None:
            self.kept = self.kept.rows(rows.to(self.kept.indices.device))
        if self.window is not None and len(rows) == len(self.window.counts):
            self.window.take(rows.to(self.window.counts.device))

    def repeat(self, times: int) -> None:
        """Repeat each row."""
        if self.visual is not None:
            rows = torch.arange(self.visual.batch, device=self.visual.device)
            self.take(rows.repeat_interleave(times))


def visual_of(mask: Tensor, capacity: int | None) -> VisualTokens | None:
    """The set of a mask [B, N], or None where it is empty and no graph depends on its shape."""
    visual = VisualTokens.from_mask(mask, capacity)
    if capacity is None and visual.max_count == 0:
        return None
    return visual
