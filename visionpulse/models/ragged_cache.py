"""A cache in which every row ends at a place of its own, while a batch is decoded ahead."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from .kv_layers import Growing, as_kind, mixed
from .sliding_layers import Sliding


class RowPlaces:
    """Where the forward under way writes, the same in all layers; None is the end of the cache."""

    slots: Tensor | None = None  # int64 [B, Q]
    size = 0  # slots that any row may use


class Ragged:
    """Mixin over Growing: each row writes at its own slots, over what was there."""

    places: ClassVar[RowPlaces | None] = None

    def update(
        self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, G, Q, D]; returns all keys and all values."""
        slots, size = self.places.slots, self.places.size
        past = self.get_seq_length()
        if self._buffers is None or not self.is_as_left or size > self._buffers[0].shape[2]:
            self._grow(past, size, key_states, value_states)
        if size > past:  # a hidden key counts with weight 0, which makes NaN of what nobody wrote
            for buffer in self._buffers:
                buffer.narrow(2, past, size - past).zero_()
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.transpose(1, 2)[rows, slots] = states.transpose(1, 2)
        views: tuple[Tensor, Tensor] = self.show(size)
        return views


class RaggedSliding:
    """Mixin over Sliding: the same, over the window that was there, which moves on for no row."""

    places: ClassVar[RowPlaces | None] = None
    slack: ClassVar[int] = 64

    def update(
        self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, G, Q, D]; returns what is held of the prompt, and all behind it."""
        slots, size = self.places.slots, self.places.size
        begin = self._held_end - self._held[0].shape[2]
        missing = size - self._held_end
        if missing > 0:  # a hidden key counts with weight 0, which makes NaN of what nobody wrote
            self._held = tuple(
                torch.nn.functional.pad(part, (0, 0, 0, missing + self.slack))
                for part in self._held
            )
            self._held_end += missing + self.slack
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        for part, states in zip(self._held, (key_states, value_states), strict=True):
            part.transpose(1, 2)[rows, slots - begin] = states.transpose(1, 2)
        self._end = size
        self.hide()
        k, v = (part.narrow(2, 0, size - begin) for part in self._held)
        return k, v


@contextmanager
def ragged(cache: Any) -> Iterator[RowPlaces]:
    """Let rows end apart; afterwards each layer is of its own kind again."""
    places = RowPlaces()
    for i, layer in enumerate(cache.layers):
        kind: Any = type(layer)
        mixin = RaggedSliding if isinstance(layer, Sliding) else Ragged
        cache.layers[i] = as_kind(mixed(mixin, kind), layer)
        cache.layers[i].places = places
    try:
        yield places
    finally:
        for i, layer in enumerate(cache.layers):
            cache.layers[i] = as_kind(type(layer).__mro__[2], layer)
            cache.layers[i].__dict__.pop("places", None)


def end_at(cache: Any, length: int, lengths: Tensor) -> None:
    """Cut to `length` slots, with zeros behind the end of each row: lengths int64 [B]."""
    behind = torch.arange(length, device=lengths.device) >= lengths[:, None]  # [B, length]
    for layer in cache.layers:
        layer.end_with(length)
        for states in (layer.keys, layer.values):
            hidden = behind[:, length - states.shape[2] :]  # a window shows the last ones
            states.masked_fill_(hidden[:, None, :, None].to(states.device), 0)


def can_be_ragged(cache: Any) -> bool:
    """Whether all its layers keep what a row may go back to."""
    layers: list[Any] = cache.layers
    return bool(layers) and all(
        isinstance(layer, Growing | Sliding) and layer.can_rewind for layer in layers
    )
