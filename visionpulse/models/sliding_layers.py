"""A layer of a cache with a sliding window that can be set back behind rejected tokens.

A window that moved on has forgotten what it must show again. So this one holds as many tokens
before the window as a round may take back.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cache import MAX_QUERIES
from .kv_layers import mixed
from .layer_ends import Rewindable

BEFORE = MAX_QUERIES  # tokens that are held before the window


class Sliding(Rewindable):
    """Mixin over DynamicSlidingWindowLayer: keys and values are its window at any end.

    Tensors that somebody else puts in their place are taken over at the next update.
    """

    _held: ClassVar[tuple[Tensor, Tensor] | None] = None  # [B, G, n, D], the last n tokens
    _held_end: ClassVar[int] = 0  # of those; the layer may end before

    @property
    def can_rewind(self: Any) -> bool:
        """Whether nobody else takes tokens back, by the record that transformers keeps."""
        return not self.record_past

    def update(
        self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, G, n, D]; returns the keys and values that some new token may see."""
        whole: tuple[Tensor, ...]
        if torch.compiler.is_compiling() or self.record_past:
            whole = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
            return whole  # type: ignore[return-value]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[2]
        known = self._known() if self.is_as_left else (self.keys, self.values)
        whole = tuple(
            torch.cat((part, states), dim=2)
            for part, states in zip(known, (key_states, value_states), strict=True)
        )
        self._held = tuple(_last(part, self.sliding_window - 1 + BEFORE) for part in whole)
        self._end = self._held_end = past + new
        self.hide()
        k, v = (_last(part, min(past, self.sliding_window - 1) + new) for part in whole)
        return k, v

    def __getattr__(self, name: str) -> Any:
        """What was not made for this end yet."""
        if name == "cumulative_length" and self.__dict__.get("_views") is not None:
            return self.end
        return super().__getattr__(name)

    def view(self: Any, part: int) -> Tensor:
        """The window over keys (0) or values (1)."""
        return _last(self._known()[part], self.sliding_window - 1)

    def _known(self: Any) -> tuple[Tensor, Tensor]:
        """What is held of the tokens before the end."""
        tokens = self._held[0].shape[2] - (self._held_end - self.end)
        k, v = (part.narrow(2, 0, tokens) for part in self._held)
        return k, v

    def reset(self: Any) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[misc]
        self._held = self._views = None


def _last(states: Tensor, tokens: int) -> Tensor:
    whole = states.shape[2]
    return states if whole <= tokens else states.narrow(2, whole - tokens, tokens)


def swap_sliding(cache: Any) -> None:
    """Put layers that can be set back in place of the untouched sliding ones of a cache."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    if getattr(cache, "offloading", False):
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            cache.layers[i] = mixed(Sliding, DynamicSlidingWindowLayer)(layer.sliding_window)
