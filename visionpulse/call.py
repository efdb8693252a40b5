"""What a backend method takes: one record for score, attend and decode, one for select."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import Cache
from .selection import Selection
from .visual import VisualTokens
from .workspace import Workspace
from .workspace import default as default_workspace


class Params(NamedTuple):
    """The numbers of one call, resolved from a config and the arguments of the op."""

    scale: float
    softcap: float = 0.0  # 0 is none
    window: int = 0  # 0 is none
    tau: float = 1.0
    r_min: float = 0.0
    r_max: float = 1.0
    mass_of: str = "max"  # which mass sets the budget
    score: str = "prob"
    anchor_output: str = "pruned"
    k_max: int = 1
    ratio: Tensor | None = None  # float32 [B], stands in for the mass
    wanted: Tensor | None = None  # int32 [B], stands in for the whole budget


class Scored(NamedTuple):
    """What select takes: the results of score, and what cuts the candidates."""

    scores: Tensor  # [B, N], contiguous; -inf where there is no candidate; of Q queries [B * Q, N]
    mass: Tensor  # [B], the largest of the heads; of Q queries [B * Q]
    mass_mean: Tensor  # the same
    visual: VisualTokens
    params: Params
    starts: Tensor | None = None  # int32 [B]
    lengths: Tensor | None = None  # int32 [B]
    workspace: Workspace | None = None
    q_counts: Tensor | None = None  # int32 [B], the last queries of a row, which are real
    selected: Selection | None = None  # filled with the selection; None is a new one

    @property
    def scratch(self) -> Workspace:
        """The scratch memory of the call."""
        return self.workspace or default_workspace(self.scores.device)

    def new_selection(self, mass: Tensor, mass_mean: Tensor) -> Selection:
        """Where the selection goes, its masses with it: the caller's, or a new one."""
        if self.selected is None:
            return new_selection(self.params.k_max, mass, mass_mean)
        return filled(self.selected, replace(self.selected, mass=mass, mass_mean=mass_mean))


class Call(NamedTuple):
    """What score, attend and decode take. The caller has checked that its parts fit."""

    q: Tensor  # [B, H, D], or [B, Q, H, D]: then the selection has the B * Q rows (b, i)
    kv: Cache
    params: Params
    visual: VisualTokens | None = None  # attend may do without
    selection: Selection | None = None  # None attends to all visible keys
    out: Tensor | None = None  # filled with the output, shaped as q; None is a new tensor
    scores: Tensor | None = None  # filled with the scores, [B, N] or [B * Q, N]
    workspace: Workspace | None = None  # None is the one of this thread and stream
    q_counts: Tensor | None = None  # int32 [B], the last queries of a row, which are real
    selected: Selection | None = None  # filled with what decode selects; None is a new one

    @property
    def scratch(self) -> Workspace:
        """The scratch memory of the call."""
        return self.workspace or default_workspace(self.q.device)

    @property
    def rows(self) -> int:
        """Rows of the scores and of the selection: B, or B * Q."""
        return self.q.shape[:-2].numel()

    @property
    def queries(self) -> int:
        """Q, or 1."""
        return self.q.shape[1] if self.q.dim() == 4 else 1

    @property
    def is_dense(self) -> bool:
        """Whether an anchor's output comes from all visible keys."""
        return self.params.anchor_output == "dense"

    @property
    def visual_set(self) -> VisualTokens:
        """The visual set of a call that scores."""
        assert self.visual is not None
        return self.visual

    def new_out(self) -> Tensor:
        """Where the output goes: the caller's tensor, or a new one."""
        if self.out is not None:
            return self.out
        return torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)

    def new_scores(self) -> Tensor:
        """Where the scores go: the caller's tensor, or a new one."""
        if self.scores is not None:
            return self.scores
        shape = (self.rows, self.kv.capacity)
        return torch.empty(shape, dtype=score_dtype(self.q), device=self.q.device)

    def scored(self, scores: Tensor, mass: Tensor, mass_mean: Tensor) -> Scored:
        """What select takes after this call."""
        kv = self.kv
        return Scored(
            scores, mass, mass_mean, self.visual_set, self.params, kv.starts, kv.lengths,
            self.workspace, self.q_counts, self.selected,
        )  # fmt: skip

    def new_masses(self) -> tuple[Tensor, Tensor]:
        """Where the masses [B] go: the caller's selection, or new tensors."""
        if self.selected is not None:
            return self.selected.mass, self.selected.mass_mean
        rows, dtype, device = self.rows, score_dtype(self.q), self.q.device
        mass = torch.empty(rows, dtype=dtype, device=device)
        return mass, torch.empty(rows, dtype=dtype, device=device)

    def new_selection(self) -> Selection:
        """Where a selection goes: the caller's, or a new one."""
        return self.selected or new_selection(self.params.k_max, *self.new_masses())


def new_selection(k_max: int, mass: Tensor, mass_mean: Tensor) -> Selection:
    """Tensors for what a backend will select, beside masses [B]."""
    rows, device = mass.shape[0], mass.device
    indices = torch.empty(rows, k_max, dtype=torch.int32, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    return Selection(indices, counts, mass, mass_mean, trusted=True)


def filled(given: Selection | None, result: Selection) -> Selection:
    """The result, copied into the caller's selection where there is one."""
    if given is None or given is result:
        return result
    for name in ("indices", "counts", "mass", "mass_mean"):
        into, new = getattr(given, name), getattr(result, name)
        if into is not new:
            into.copy_(new)
    return given


def score_dtype(q: Tensor) -> torch.dtype:
    """The dtype of scores and masses: float32, but float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
