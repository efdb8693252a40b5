"""What belongs to one conversation: its visual tokens, and the selection of its last step."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..selection import Selection
from ..visual import VisualTokens
from .lookback import LookBack
from .notices import DenseReason


class DraftStart(NamedTuple):
    """What the draft behind a decode step goes on from."""

    selection: Selection | None
    roles: object
    buffers: tuple[Tensor, ...] | None = None  # of a compiled lookback; empty without one


@dataclass
class Conversation:
    """Carried by a cache; copied, cropped and reordered with it."""

    number: int = 0  # in a trace
    visual: VisualTokens | None = None  # None: no row has a visual token
    inverse: Tensor | None = None  # float32 [B], 1 / N_v, and 0 for rows without visual tokens
    has_picture: bool = False  # some row had a visual token at the last prefill or crop
    unknown_because: DenseReason | None = None  # why the positions of its pictures are unknown
    has_holes: bool = False  # some row hides keys between visible ones: the model's attention only
    capacity: int | None = None  # slots of a static cache, whose set keeps one shape for its graph
    steps: int = 0  # decode steps since the last prefill or crop
    selection: Selection | None = None  # of the last step, for the schedule that looks back
    selection_roles: object = field(default=None, repr=False)  # under which it was made
    lookback: LookBack | None = None  # the same for a compiled step, with a static cache

    @property
    def needs_mask(self) -> bool:
        """Whether a static cache holds it: without a mask the empty slots would be keys."""
        return self.capacity is not None

    def set_visual(self, visual: VisualTokens | None) -> None:
        """Take a new visual set; the steps start anew."""
        self.visual = visual
        self.inverse = None
        self.has_picture = visual is not None and bool((visual.counts > 0).any())
        if visual is not None:
            n = visual.counts
            self.inverse = torch.where(n > 0, 1.0 / n.clamp(min=1), 0.0)
        self.restart()

    def restart(self) -> None:
        """Forget the last step: after a prefill or a crop there is no selection."""
        self.steps, self.selection, self.selection_roles = 0, None, None
        if self.lookback is not None:
            self.lookback.restart()

    def place(self, in_graph: bool) -> DraftStart:
        """Where it is; a compiled step writes over its buffers, so they are copied."""
        buffers: tuple[Tensor, ...] | None = None
        if in_graph:
            buffers = () if self.lookback is None else self.lookback.kept()
        return DraftStart(self.selection, self.selection_roles, buffers)

    def go_to(self, place: DraftStart) -> None:
        """Go back, or on, to a place."""
        self.selection, self.selection_roles, buffers = place
        if buffers and self.lookback is not None:
            self.lookback.put_back(buffers)

    def follow(self, roles: object) -> None:
        """Begin anew in a compiled step whose last selection was made under other roles."""
        if self.selection_roles is not roles:
            self.selection, self.selection_roles = None, roles
            if self.lookback is not None:
                self.lookback.restart()

    def prepare_lookback(self, spare: LookBack | None) -> None:
        """Load the buffers of a compiled lookback: its own, the `spare` ones, or new ones."""
        if self.visual is None:
            return
        buffers = self.lookback or spare
        if buffers is not None and buffers.fits(self.visual):
            buffers.load(self.visual)
            self.lookback = buffers
        else:
            self.lookback = LookBack(self.visual)

    def crop(self, length: int) -> None:
        """Cut to the first `length` tokens."""
        if self.visual is not None and self.visual.size > length:
            if self.capacity is not None:
                mask = self.visual.mask(self.capacity)
                mask[:, length:] = False
                self.set_visual(visual_set(mask, self.capacity))
            else:
                self.set_visual(visual_set(self.visual.mask(length), None) if length else None)
            if self.lookback is not None:
                self.prepare_lookback(None)  # its buffers name tokens that are gone
        self.restart()

    def take(self, rows: Tensor) -> None:
        """Reorder or pick rows."""
        if self.visual is not None:
            rows = rows.to(self.visual.device)
            self.visual = self.visual.rows(rows)
            self.inverse = self.inverse[rows] if self.inverse is not None else None
        if self.selection is not None:
            self.selection = self.selection.rows(rows.to(self.selection.indices.device))
        if self.lookback is not None and len(rows) == len(self.lookback.counts):
            self.lookback.take(rows.to(self.lookback.counts.device))

    def repeat(self, times: int) -> None:
        """Repeat each row."""
        if self.visual is not None:
            rows = torch.arange(self.visual.batch, device=self.visual.device)
            self.take(rows.repeat_interleave(times))


def visual_set(mask: Tensor, capacity: int | None) -> VisualTokens | None:
    """The set of a mask [B, N], or None where it is empty and no graph depends on its shape."""
    visual = VisualTokens.from_mask(mask, capacity)
    if capacity is None and visual.max_count == 0:
        return None
    return visual
