"""One decode step of a patched model: made by the hook on the decoder, used by every layer.

It travels in the keyword arguments of one forward, so two threads never share one. Nothing in it
reads the device: visibility is derived from the model's own mask by device arithmetic.
"""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..cache import KVCache
from ..config import PulseConfig
from ..layer_ops import LayerOps, cache_of
from ..schedule import Role
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import default as default_workspace
from .plan import Plan
from .state import CacheState
from .stats import Recorder
from .tensor_parallel import HeadGroup


class Step:
    """The context of one forward; it has no `.to`, which dispatch hooks would call."""

    def __init__(
        self,
        plan: Plan,
        state: CacheState,
        layers: dict[Any, LayerOps],
        recorder: Recorder,
        heads: HeadGroup | None,
        token: Tensor | None,
    ) -> None:
        self.plan = plan
        self.config: PulseConfig = plan.config
        self.state = state
        self.layers = layers
        self.recorder = recorder
        self.heads = heads
        self.token = token  # [B, 1], recorded with the selection
        self.compiled = torch.compiler.is_compiling()
        self.visual: VisualTokens | None = state.visual
        self.number = state.steps
        self.roles = plan.text if state.visual is None else plan.roles(state.steps)
        self.selection: Selection | None = None
        self.needs_mask = state.needs_mask
        self.is_first = True  # no anchor has selected yet
        self.refused: str | None = None  # why a layer was left to the model
        if self.compiled and state.window is not None and self.roles is not plan.text:
            if plan.looks_back:  # the choice between a fresh and a later step is made on the device
                self.roles, self.selection = plan.later, state.window.early(plan.config.refresh)
        elif plan.looks_back and self.roles is plan.later:
            if state.kept_by is plan and state.kept is not None:
                self.selection = state.kept
            else:
                self.roles = plan.fresh
        # the shape that was prepared, and the cut of its rows
        self.ready: LayerOps | None = None
        self.shapes: tuple[Any, ...] = ()
        self.mask: Tensor | None = None
        self.lengths: Tensor | None = None
        self.starts: Tensor | None = None

    def run(
        self,
        role: Role,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend with one query per row: query [B, H, 1, D] to [B, 1, H, D]."""
        if role is Role.FOLLOWER and self.selection is None:
            role = Role.DENSE  # the anchor was left to the model
        q = query.squeeze(2)
        if mask is not self.mask:
            self.starts, self.lengths = row_cuts(mask, key.shape[0])
            self.mask = mask
        if self.compiled:
            return self._compiled(role, layer, q, key, value, scale, softcap).unsqueeze(1)
        shapes = (query.shape, key.shape, key.device, key.dtype, scale, softcap)
        if shapes != self.shapes:
            self._prepare(q, key, value, shapes)
        kv = cache_of(key, value, self.lengths, self.starts)
        ready, work = self.ready, self.work
        assert ready is not None  # made by _prepare
        if role is Role.FOLLOWER:
            return ready.attend(q, kv, self.visual, self.selection, work).unsqueeze(1)
        if role is Role.DENSE:
            return ready.attend(q, kv, None, None, work).unsqueeze(1)
        visual = self.visual
        assert visual is not None  # without visual tokens no layer is an anchor
        if self.heads is not None and self.heads.splits(q):
            out, selection = self.heads.decode(q, kv, visual, self.config, scale, softcap)
        else:
            out, selection = ready.decode(q, kv, visual, work)
        self._keep(selection, layer)
        return out.unsqueeze(1)

    def _prepare(self, q: Tensor, key: Tensor, value: Tensor, shapes: tuple[Any, ...]) -> None:
        """Check the first layer of a shape; move what crosses layers to its device."""
        if self.visual is not None:
            self.visual = self.visual.to(key.device)
        if self.selection is not None:
            self.selection = self.selection.to(key.device)
        kv = KVCache(key, value, self.lengths, self.starts)
        query_shape, key_shape, device, dtype, scale, softcap = shapes
        name = (query_shape, key_shape[1], key_shape[3], device, dtype, scale, softcap, self.plan)
        ready = self.layers.get(name)
        if ready is None:
            ready = LayerOps(q, kv, self.visual, self.config, scale=scale, softcap=softcap)
            self.layers[name] = ready
        self.ready, self.shapes = ready, shapes
        self.work = default_workspace(device)

    def _compiled(
        self,
        role: Role,
        layer: int,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        kv = KVCache(key, value, self.lengths, self.starts)
        numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}
        if role is Role.FOLLOWER:
            backend = self.config.backend
            return ops.attend(q, kv, self.visual, self.selection, backend=backend, **numbers)
        if role is Role.DENSE:
            return ops.attend(q, kv, backend=self.config.backend, **numbers)
        assert self.visual is not None
        if self.heads is not None and self.heads.splits(q):
            out, selection = self.heads.decode(q, kv, self.visual, self.config, scale, softcap)
        else:
            out, selection = ops.decode(q, kv, self.visual, self.config, **numbers)
        self._keep(selection, layer)
        return out

    def _keep(self, selection: Selection, layer: int) -> None:
        """Take the anchor's selection: for the followers, the next step and the statistics."""
        self.selection = selection
        window = self.state.window
        if self.compiled:
            if self.plan.looks_back and window is not None:
                window.keep(selection)
        elif self.plan.looks_back:
            self.state.kept, self.state.kept_by = selection, self.plan
            if window is not None:
                window.restart()  # it has not seen this step
        step = (self.number, layer, self.token)
        self.recorder.add(selection, self.state, self.is_first, step)
        self.is_first = False


def row_cuts(mask: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Starts and lengths, int32 [B], of the run of visible keys that a decode mask leaves."""
    if mask is None:
        return None, None
    visible = visible_keys(mask).to(torch.int8).expand(rows, -1)
    starts = visible.argmax(1).to(torch.int32)
    return starts, starts + visible.sum(1, dtype=torch.int32)


def visible_keys(mask: Tensor) -> Tensor:
    """What the last query of a mask sees: bool [B, N].

    Masks come as bool or additive [B, 1, Q, N], or as 0 and 1 [B, N].
    """
    last = mask if mask.dim() == 2 else mask[:, 0, -1]
    if last.is_floating_point():
        return last > torch.finfo(last.dtype).min / 2  # additive: 0 where visible
    return last != 0
