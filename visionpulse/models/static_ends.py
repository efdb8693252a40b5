"""Where a static cache ends, while tokens are checked ahead of its owner.

Its buffers and shapes stay: the end is a number on the device, so setting it back is the whole
rollback. What lies behind it is hidden by every mask, and written over.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_static(cache: Any) -> bool:
    """Whether all its layers are static and keep what lies before their end."""
    from transformers.cache_utils import StaticLayer

    return bool(cache.layers) and all(
        isinstance(layer, StaticLayer) and not layer.is_sliding and layer.is_initialized
        for layer in cache.layers
    )


def why_not(cache: Any) -> str:
    """What keeps a static cache from being set back, as the end of a sentence."""
    slides = any(layer.is_compileable and layer.is_sliding for layer in cache.layers)
    return ": its static sliding windows forget what a rejected token pushed out" if slides else ""


def slots_of(cache: Any) -> int:
    """The tokens that it can hold."""
    return int(cache.layers[0].get_max_length())


class StaticEnd:
    """The end of all layers of a static cache."""

    def __init__(self, layers: Sequence[Any], length: int) -> None:
        self.length = length
        self._lengths: list[Tensor] = [layer.cumulative_length for layer in layers]
        self._keys: list[Tensor] = [layer.keys for layer in layers]
        self.move(length)

    def move(self, length: int) -> None:
        """Let all layers end at `length`, in place: a graph knows the numbers by their address."""
        self.length = length
        torch._foreach_zero_(self._lengths)
        torch._foreach_add_(self._lengths, length)

    def is_of(self, layers: Sequence[Any]) -> bool:
        """Whether the layers are those, and nobody has updated or cropped one; reads the device."""
        same = len(layers) == len(self._keys) and all(
            layer.keys is keys for layer, keys in zip(layers, self._keys, strict=True)
        )
        return same and bool((torch.stack(self._lengths) == self.length).all())
