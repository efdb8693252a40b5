"""Layers of a transformers cache: one that grows in place, and one that carries a conversation.

torch.cat reads and writes the whole cache in every step; a buffer with slack writes one token. Both
are mixins over the layers of transformers, which keep their mask sizes, cropping and batch
operations.
"""

import sys
from functools import cache as memoize
from typing import Any, ClassVar

import torch
from torch import Tensor

from .conversation import Conversation
from .layer_ends import NOTHING, Rewindable
from .lookback import LookBack

SPARE_SHARE = 4  # a buffer with more than a quarter to spare is let go


class Growing(Rewindable):
    """Mixin over DynamicLayer: keys and values are views of buffers with slack.

    Anyone may replace `keys` and `values` (crop, reorder, offload, reset): tensors that are not the
    views made here are taken over at the next update.
    """

    slack_tokens: ClassVar[int] = 256  # slack of a short cache
    slack_share: ClassVar[int] = 8  # slack of a long one: an eighth of its tokens
    _buffers: ClassVar[tuple[Tensor, Tensor] | None] = None  # [B, G, slots, D]

    def update(
        self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, G, n, D]; returns all keys and all values."""
        if torch.compiler.is_compiling() or key_states.requires_grad:
            whole: tuple[Tensor, Tensor]
            whole = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
            return whole
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.is_as_left:
            self._take_over(key_states, value_states)
        past = self.end
        total = past + key_states.shape[2]
        if self._buffers is None or total > self._buffers[0].shape[2]:
            self._grow(past, total, key_states, value_states)
        k, v = self._buffers
        k.narrow(2, past, total - past).copy_(key_states)
        v.narrow(2, past, total - past).copy_(value_states)
        views: tuple[Tensor, Tensor] = self.show(total)
        return views

    def show(self: Any, length: int) -> tuple[Tensor, Tensor]:
        """Let keys and values be the first tokens of the buffers; returns them."""
        k, v = self._buffers
        self._end = length
        views = k.narrow(2, 0, length), v.narrow(2, 0, length)
        if self.stays_hidden:
            if self._views is not NOTHING:
                self.hide()
            return views
        self._views = views
        self.keys, self.values = views
        return views

    def view(self: Any, part: int) -> Tensor:
        """Keys (0) or values (1) as far as the layer goes."""
        whole: Tensor = self._buffers[part]
        return whole.narrow(2, 0, self.end)

    def _slots_for(self, tokens: int) -> int:
        return tokens + max(self.slack_tokens, tokens // self.slack_share)

    def _is_too_large(self, slots: int, tokens: int) -> bool:
        return slots > self._slots_for(tokens) and slots > tokens + tokens // SPARE_SHARE

    def _take_over(self: Any, key_states: Tensor, value_states: Tensor) -> None:
        """Keep the buffers if keys and values still lie at their front, else let them go."""
        buffers, keys, values = self._buffers, self.keys, self.values
        tokens = keys.shape[2] if keys.dim() == 4 else 0
        self._views, self._end = None, tokens
        if buffers is None or keys.dim() != 4:
            self._buffers = None
            return
        pairs = ((buffers[0], keys), (buffers[1], values))
        lies_inside = all(
            part.data_ptr() == whole.data_ptr()
            and part.shape[:2] == whole.shape[:2]
            and part.stride() == whole.stride()
            and not (whole.is_inference() and not torch.is_inference_mode_enabled())
            for whole, part in pairs
        )
        if not lies_inside or self._is_too_large(buffers[0].shape[2], tokens):
            self._buffers = None

    def _grow(self: Any, past: int, total: int, key_states: Tensor, value_states: Tensor) -> None:
        """Move `past` tokens into larger buffers, one at a time to bound the peak."""
        slots, buffers = self._slots_for(total), []
        old = (self.keys, self.values)
        self._buffers = self._views = None
        for before, like in zip(old, (key_states, value_states), strict=True):
            with torch.inference_mode(False):  # made inside, it could not be written outside later
                buffer = torch.empty(
                    (like.shape[0], like.shape[1], slots, like.shape[3]),
                    dtype=like.dtype,
                    device=like.device,
                )
            if past:
                buffer.narrow(2, 0, past).copy_(before)
            buffers.append(buffer)
        self._buffers = tuple(buffers)

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        """Drop tokens from the end, and the buffers if they become much too large."""
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if self._buffers is not None and self.is_initialized:
            tokens = self.keys.shape[2]
            if self._is_too_large(self._buffers[0].shape[2], tokens):
                self.keys, self.values = self.keys.clone(), self.values.clone()
                self._buffers = self._views = None

    def reset(self: Any) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[misc]
        self._buffers = self._views = None


class Carrier:
    """Mixin over the cache layer that carries a conversation.

    The rows and the length of the cache change together with the conversation's, and a copy of the
    cache has a copy of it.
    """

    visionpulse: ClassVar[Conversation | None] = None
    spare_lookback: ClassVar[LookBack | None] = None  # of the conversation before a reset

    def reset(self: Any) -> None:
        """Forget the conversation."""
        super().reset()  # type: ignore[misc]
        if self.visionpulse is not None:  # a graph knows the buffers by their addresses
            self.spare_lookback, self.visionpulse = self.visionpulse.lookback, None

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        """Drop tokens from the end."""
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if self.visionpulse is not None:
            self.visionpulse.crop(int(self.get_seq_length()))

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        """Put the rows in another order."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.visionpulse is not None:
            self.visionpulse.take(beam_idx)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.visionpulse is not None:
            self.visionpulse.repeat(repeats)

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.visionpulse is not None:
            self.visionpulse.take(indices)


@memoize
def mixed(mixin: Any, layer: Any) -> Any:
    """The class `mixin` over `layer`; an attribute of this module, so that it can be pickled."""
    name = f"{mixin.__name__}{layer.__name__}"
    kind = type(name, (mixin, layer), {"__module__": __name__})
    setattr(sys.modules[__name__], name, kind)
    return kind


def swap_layers(cache: Any, layers: int) -> None:
    """Put growing layers in place of the untouched dynamic layers of a cache."""
    from transformers.cache_utils import DynamicLayer

    if getattr(cache, "offloading", False):
        return  # it moves keys and values between devices itself
    growing = mixed(Growing, DynamicLayer)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(growing() for _ in range(layers - len(cache.layers)))
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = growing()


def has_layers(cache: Any) -> bool:
    """Whether this is a cache of transformers made of layers."""
    return hasattr(cache, "layers") and hasattr(cache, "layer_class_to_replicate")


def conversation_of(cache: Any, layer: int) -> Conversation | None:
    """The conversation that the cache carries at `layer`, if any."""
    layers = getattr(cache, "layers", ())
    return getattr(layers[layer], "visionpulse", None) if len(layers) > layer else None


def attach(cache: Any, layer: int, conversation: Conversation | None) -> None:
    """Let the cache carry a conversation; without effect on a cache that has no such layer."""
    if not has_layers(cache) or len(cache.layers) <= layer:
        return
    carrier = cache.layers[layer]
    if not isinstance(carrier, Carrier):
        kind: Any = type(carrier)
        carrier = cache.layers[layer] = as_kind(mixed(Carrier, kind), carrier)
    carrier.visionpulse = conversation


def release(cache: Any) -> None:
    """Give the carrying layer of a cache its own class back."""
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(layer, Carrier):
            cache.layers[i] = as_kind(type(layer).__mro__[2], layer)
            for name in ("visionpulse", "spare_lookback"):
                cache.layers[i].__dict__.pop(name, None)


def as_kind(kind: Any, layer: Any) -> Any:
    """The same layer as an object of another class; Python may refuse to change it in place."""
    other = object.__new__(kind)
    other.__dict__.update(layer.__dict__)
    return other
