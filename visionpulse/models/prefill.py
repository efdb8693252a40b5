"""Brings the conversation that a cache carries up to the tokens of a prefill."""

from typing import Any

import torch
from torch import Tensor

from .conversation import Conversation, visual_set
from .dense_steps import DenseSteps
from .kv_layers import attach, conversation_of, has_layers
from .masks import has_holes
from .notices import DenseReason
from .patched_model import PatchedModel
from .visual_positions import VisualPositions


class Prefill:
    """What a session does in a forward that is no decode step; it may read the device."""

    def __init__(
        self, patched: PatchedModel, positions: VisualPositions, dense: DenseSteps
    ) -> None:
        self._patched = patched
        self._positions = positions
        self._dense = dense
        self._layer = patched.anatomy.first_full

    def take(self, cache: Any, inputs: Tensor, mask: Any) -> Conversation | None:
        """Let the cache carry the conversation with `inputs` [B, Q, ...] at its end.

        Returns it where there is no cache yet, because the decoder makes one itself.
        """
        patched = self._patched
        visual_mask = self._positions.visual_mask(inputs)
        if cache is not None and not has_layers(cache):
            if inputs.shape[1] == 1:
                might_have_picture = self._positions.has_picture is not False
                self._dense.add(DenseReason.CACHE_KIND, might_have_picture, type(cache).__name__)
            if patched.stores_8_bits:
                raise TypeError(
                    f"cache='fp8' needs a cache of transformers with layers, got a "
                    f"{type(cache).__name__}; pass a DynamicCache, or leave cache='fp8' out"
                )
            return None
        past, capacity, conversation = 0, None, None
        if cache is not None:
            patched.swap_layers(cache)
            patched.fit_layers(cache)
            patched.notices.cache(cache)
            conversation = conversation_of(cache, self._layer)
            past = int(cache.get_seq_length(self._layer)) if len(cache.layers) else 0
            capacity = _capacity(cache, self._layer)
        unseen = past if conversation is None else 0
        if conversation is None:
            conversation = patched.new_conversation()
        conversation.capacity = capacity
        conversation.has_holes = has_holes(mask, past + inputs.shape[1])
        self._update_visual(conversation, inputs, visual_mask, past)
        self._explain_unknown(conversation, inputs, unseen)
        self._dense.prefill_has_picture = conversation.has_picture
        if capacity is not None and (patched.layer_roles.looks_back or patched.mode is not None):
            carrier = cache.layers[self._layer]
            conversation.prepare_lookback(getattr(carrier, "spare_lookback", None))
        patched.recorder.prepare(inputs.device)
        if cache is None:
            return conversation
        attach(cache, self._layer, conversation)
        return None

    def _update_visual(
        self, conversation: Conversation, inputs: Tensor, visual_mask: Tensor | None, past: int
    ) -> None:
        """Add the visual tokens of `inputs` [B, Q, ...] to the set, behind `past` tokens."""
        positions, capacity = self._positions, conversation.capacity
        if past and not positions.has_features:
            visual_mask = None  # a generated placeholder, or a text turn: nothing new is visual
        known = conversation.visual if past else None
        if visual_mask is None and known is not None and known.size <= max(past, capacity or 0):
            conversation.restart()
            return
        if visual_mask is None and known is None and capacity is None:
            conversation.set_visual(None)
            return
        rows, total = inputs.shape[0], past + inputs.shape[1]
        size = max(total, capacity or 0)
        mask = torch.zeros(rows, size, dtype=torch.bool, device=inputs.device)
        if known is not None:
            mask[:, :past] = known.mask(past)
        if visual_mask is not None:
            mask[:, past:total] = visual_mask
        # one shape for every prompt of a static cache, so that they share a compiled graph
        conversation.set_visual(visual_set(mask, capacity))
        if visual_mask is not None and not positions.has_features:
            self._patched.notices.prompt(conversation.visual, positions.is_embedded)

    def _explain_unknown(self, conversation: Conversation, inputs: Tensor, unseen: int) -> None:
        """Note why the pictures of a prefill are unknown; `unseen` tokens lie before it."""
        positions, is_step = self._positions, inputs.shape[1] == 1
        if conversation.has_picture:
            conversation.unknown_because = None
        elif unseen:
            no_picture = positions.has_picture is False
            conversation.unknown_because = None if no_picture else DenseReason.CACHE_UNSEEN
        elif positions.passed_base and positions.has_features:
            conversation.unknown_because = DenseReason.POSITIONS
        elif not positions.passed_base and not positions.has_user_mask and not is_step:
            conversation.unknown_because = DenseReason.PROMPT_UNSEEN
        reason = conversation.unknown_because
        if is_step and reason is not None:
            self._dense.add(reason, True)
        elif is_step and unseen:
            self._dense.add(DenseReason.TEXT, False)
        elif conversation.capacity is not None and reason is not None:
            self._dense.warn(reason)  # compiled steps, of a static cache, cannot


def _capacity(cache: Any, layer: int) -> int | None:
    """The slots of a static cache."""
    part = cache.layers[layer] if len(cache.layers) > layer else None
    return int(part.get_max_length()) if part is not None and part.is_compileable else None
