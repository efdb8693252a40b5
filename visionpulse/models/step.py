"""One decode step of a patched model: made by the hook on the decoder, used by every layer.

Several tokens behind a cache are so many steps in one: each query has a selection of its own.

It travels in the keyword arguments of one forward, so two threads never share one. Nothing in it
reads the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..float8 import FLOAT8, read
from ..layer_ops import LayerOps, cache_of
from ..schedule import Role
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import default as default_workspace
from .conversation import Conversation
from .masks import row_cuts
from .patched_model import PatchedModel
from .traced_ops import TracedOps


class Step:
    """The context of one forward; it has no `.to`, which dispatch hooks would call."""

    def __init__(
        self,
        patched: PatchedModel,
        conversation: Conversation,
        token: Tensor | None,
        queries: int = 1,
        is_dense: bool = False,
        kv_layers: Sequence[Any] = (),
    ) -> None:
        self.patched = patched
        self.is_dense = is_dense  # of a lossless model, counted before it began
        self.layer_roles = patched.roles_now
        self.config = self.layer_roles.config
        self.conversation = conversation
        self.kv_layers = kv_layers  # of the cache; without them it may hold no 8-bit floats
        self.token = token  # [B, Q], recorded with the selection
        self.queries = queries
        self.number = conversation.steps
        self.needs_mask = conversation.needs_mask
        self.is_compiled = torch.compiler.is_compiling()
        self.visual: VisualTokens | None = conversation.visual
        self.roles, self.selection = self._roles_and_selection()
        self.has_selected = False  # an anchor made the selection in this step
        self.refusal: str | None = None  # why a layer was left to the model
        # the cut of the rows that a mask makes, and the ops that were checked for a shape
        self.mask: Tensor | None = None
        self.starts: Tensor | None = None
        self.lengths: Tensor | None = None
        self.shape: tuple[Any, ...] = ()
        self.layer_ops: Any = None
        self.workspace: Any = None  # a graph has none

    def _roles_and_selection(self) -> tuple[tuple[Role, ...], Selection | None]:
        """The roles of this step, and the selection that layers before the anchor follow."""
        roles, conversation = self.layer_roles, self.conversation
        if self.is_dense:
            return roles.on_text, None
        if self.queries > 1:  # never of a schedule that looks back
            is_text = conversation.visual is None
            return (Role.MODEL,) * len(roles.on_text) if is_text else roles.on_queries, None
        if conversation.visual is None:
            return roles.on_text, None
        if not roles.looks_back:
            return roles.on_refresh, None
        if self.is_compiled and conversation.lookback is not None:
            # whether this is a refresh is decided on the device, so that one graph serves both
            return roles.on_lookback, conversation.lookback.selection(self.config.refresh)
        if conversation.selection is None or conversation.selection_roles is not roles:
            return roles.on_refresh, None
        now = roles.at(self.number)
        return now, conversation.selection if now is roles.on_lookback else None

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
        """Attend with the queries of each row: query [B, H, Q, D] to [B, Q, H, D]."""
        if role is Role.FOLLOWER and self.selection is None:
            role = Role.DENSE  # the anchor was left to the model
        several = query.shape[2] > 1
        q = query.transpose(1, 2) if several else query.squeeze(2)
        if mask is not self.mask:
            self.starts, self.lengths = row_cuts(mask, key.shape[0])
            self.mask = mask
        scales = self._scales(layer, key)
        if self.is_compiled:
            self.layer_ops = TracedOps(self.config, scale, softcap)
            kv = KVCache(key, value, self.lengths, self.starts, *scales)
        else:
            shape = (query.shape, key.shape, key.device, key.dtype, scale, softcap)
            if shape != self.shape:
                self._prepare(q, KVCache(key, value, self.lengths, self.starts, *scales), shape)
            kv = cache_of(key, value, self.lengths, self.starts, *scales)
        if role is Role.ANCHOR:
            out = self._decode(layer, q, kv, scale, softcap)
        elif role is Role.FOLLOWER:
            out = self.layer_ops.attend(q, kv, self.visual, self.selection, self.workspace)
        else:
            out = self.layer_ops.attend(q, kv, None, None, self.workspace)
        return out if several else out.unsqueeze(1)

    def read_back(
        self, layer: int, key: Tensor, value: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values for the model's own attention, which cannot read 8 bits."""
        if key.dtype != FLOAT8:
            return key, value
        k_scale, v_scale = self._scales(layer, key)
        return read(key, k_scale, 1, dtype), read(value, v_scale, 1, dtype)

    def _scales(self, layer: int, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What an 8-bit layer's keys and values are multiplied with."""
        if key.dtype != FLOAT8:
            return None, None
        stored = self.kv_layers[layer]
        return stored.k_scale, stored.v_scale

    def _prepare(self, q: Tensor, kv: KVCache, shape: tuple[Any, ...]) -> None:
        """Check the first layer of a shape; move what crosses layers to its device."""
        if self.visual is not None:
            self.visual = self.visual.to(kv.device)
        if self.selection is not None:
            self.selection = self.selection.to(kv.device)
        query_shape, key_shape, *rest = shape
        name = (query_shape, key_shape[1], key_shape[3], *rest, self.layer_roles)  # of any length
        layer_ops = self.patched.ops_by_shape.get(name)
        if layer_ops is None:
            scale, softcap = rest[-2:]
            layer_ops = LayerOps(q, kv, self.visual, self.config, scale=scale, softcap=softcap)
            self.patched.ops_by_shape[name] = layer_ops
        self.layer_ops, self.shape = layer_ops, shape
        self.workspace = default_workspace(kv.device)

    def _decode(
        self, layer: int, q: Tensor, kv: KVCache, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Select at an anchor, and attend to the selection: [B, H, D]."""
        visual, heads = self.visual, self.patched.heads
        assert visual is not None  # without visual tokens no layer is an anchor
        out: Tensor
        if heads is not None and heads.splits(q):
            out, selection = heads.decode(q, kv, visual, self.config, scale, softcap)
        else:
            out, selection = self.layer_ops.decode(q, kv, visual, self.workspace)
        self._keep(selection, layer)
        return out

    def _keep(self, selection: Selection, layer: int) -> None:
        """Hand a selection to the followers, to the next step and to the statistics."""
        conversation, self.selection = self.conversation, selection
        if self.layer_roles.looks_back:
            if not self.is_compiled:
                conversation.selection, conversation.selection_roles = selection, self.layer_roles
            if conversation.lookback is not None:
                if self.is_compiled:
                    conversation.lookback.keep(selection)
                else:
                    conversation.lookback.restart()  # it has not seen this step
        for i in range(self.queries):
            token = None if self.token is None else self.token[:, i : i + 1]
            step = (self.number + i, layer, token)
            one = selection.query(i, self.queries)
            self.patched.recorder.add(one, conversation, not self.has_selected, step)
        self.has_selected = True
