"""Layers of a transformers cache that store keys and values in 8 bits, with a scale for each head.

The scales come from the prompt: K and V of one head share no scale, the rows of a batch do. A later
chunk of a prompt may raise them. A decode step never does: what overflows there is clamped and
counted on the device.

Attention of a decode step reads what is stored. Anyone else gets the numbers in the model's dtype:
those of the forward as they were computed, those before it read back.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..float8 import FLOAT8, LARGEST, along, read, stored
from .kv_layers import Carrier, Growing, attach, mixed

HEADROOM = 64  # 448 / 64 = 7: a scale leaves 3.5 to 7 times the largest number of the prompt
_EXPONENT = 0x7F800000  # of a float32


def scales_for(states: Tensor) -> Tensor:
    """A power of two for each head of [B, heads, n, D]: float32 [heads].

    Powers of two are read back exactly in 16 bits, and raising one by another rounds no number but
    the smallest.
    """
    largest = torch.maximum(states.amax((0, 2, 3)), -states.amin((0, 2, 3))).float()
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)  # rounded down
    is_usable = (power > 0) & (power < torch.inf)  # neither zeros, NaN nor infinities
    return torch.where(is_usable, power / HEADROOM, 1.0)


class Clamped:
    """How many numbers did not fit, by device; the copies of a cache count together."""

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Clamped":
        return self

    def add(self, states: Tensor, scales: Tensor) -> None:
        """Count those of [B, heads, n, D]; reads nothing back."""
        limit = along(scales * LARGEST, 4, 1)
        self._count(states.device).add_((states.abs() > limit).sum())

    def _count(self, device: torch.device) -> Tensor:
        count = self._counts.get(device)
        if count is None:  # at the first prefill, so outside of any graph
            with torch.inference_mode(False):
                count = self._counts[device] = torch.zeros((), dtype=torch.int64, device=device)
            torch._dynamo.mark_static_address(count)
        return count

    def total(self) -> int:
        """All of them; reads the device."""
        return sum(int(count) for count in self._counts.values())

    def reset(self) -> None:
        """Start counting anew."""
        for count in self._counts.values():
            count.zero_()


class Float8:
    """What both kinds of layer share."""

    scales: ClassVar[Tensor | None] = None  # float32 [2 G]: those of K, then those of V
    clamped: ClassVar[Clamped | None] = None
    serves_step: ClassVar[bool] = False  # the next update is that of a decode step

    @property
    def k_scale(self) -> Tensor:
        """The scales of K: float32 [G]."""
        return self._scale(0)

    @property
    def v_scale(self) -> Tensor:
        """The scales of V: float32 [G]."""
        return self._scale(1)

    def _scale(self, part: int) -> Tensor:
        assert self.scales is not None  # there is a token
        heads = self.scales.shape[0] // 2
        return self.scales.narrow(0, part * heads, heads)

    def read_back(self, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
        """The first `tokens` of what is stored, in another dtype: a copy."""
        layer: Any = self
        return (
            read(layer.keys[:, :, :tokens], self.k_scale, 1, dtype),
            read(layer.values[:, :, :tokens], self.v_scale, 1, dtype),
        )

    def _is_of_step(self) -> bool:
        is_step, self.serves_step = self.serves_step, False  # type: ignore[misc]
        return is_step

    def _stored(self, states: Tensor) -> tuple[Tensor, ...]:
        """K and V side by side, [B, 2 G, n, D], as they are stored."""
        assert self.scales is not None
        if self.clamped is not None:
            self.clamped.add(states, self.scales)
        return stored(states, self.scales).chunk(2, dim=1)

    def _raised(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Scales that hold these states too, K and V under them; None if they do already.

        Reads the device, as a prefill may.
        """
        layer: Any = self
        assert self.scales is not None
        scales = torch.maximum(self.scales, scales_for(states))
        if not bool((scales > self.scales).any()):
            return None
        lowered = (self.scales / scales).view(2, 1, -1, 1, 1)
        k, v = (
            (old.float() * by).to(FLOAT8)
            for old, by in zip((layer.keys, layer.values), lowered, strict=True)
        )
        return scales, k, v

    def __getstate__(self: Any) -> dict[str, Any]:
        """The layer as plain bytes: torch pickles no storage of 8-bit floats."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_buffers", "_views")}
        for name in ("keys", "values"):
            if isinstance(state[name], Tensor):
                state[name] = state[name].contiguous().view(torch.uint8)
        return state

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in ("keys", "values"):
            if isinstance(state[name], Tensor):
                setattr(self, name, state[name].view(FLOAT8))


def _side_by_side(k: Tensor, v: Tensor, past: int) -> Tensor:
    """K and V [B, G, n, D] as [B, 2 G, n, D], without a gradient."""
    if k.shape != v.shape:
        raise ValueError(
            f"cache='fp8' needs keys and values of one shape, got {tuple(k.shape)} and "
            f"{tuple(v.shape)}; leave it out for this model"
        )
    if past and k.requires_grad:
        raise RuntimeError(
            "a cache of 8 bits carries no gradient to the tokens in it; run the model under "
            "torch.no_grad(), or leave cache='fp8' out"
        )
    return torch.cat((k, v), 1).detach()


class Float8Growing(Float8, Growing):
    """Mixin over DynamicLayer: a growing layer of 8 bits."""

    slack_tokens = 64  # a buffer of 8192 tokens is 1.6 % larger than what it holds
    slack_share = 64

    def update(
        self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, G, n, D]; returns all keys and values, 8-bit ones in a decode step."""
        is_step, past = self._is_of_step(), self.get_seq_length()
        states = _side_by_side(key_states, value_states, past)
        if not past:
            self.scales = scales_for(states)
        elif not is_step and states.shape[2] > 1 and (raised := self._raised(states)):
            self.scales, self.keys, self.values = raised
        k, v = super().update(*self._stored(states))
        if is_step:
            return k, v
        if not past:
            return key_states, value_states
        before = self.read_back(key_states.dtype, past)
        return torch.cat((before[0], key_states), 2), torch.cat((before[1], value_states), 2)


class Float8Static(Float8):
    """Mixin over StaticLayer, for graphs: nothing moves, scales included."""

    is_scaled: ClassVar[bool] = False  # the scales are those of the prompt in it

    def lazy_initialization(self: Any, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate 8-bit slots for states like these."""
        rows, heads, _, width = key_states.shape
        like = key_states.new_empty(rows, heads, 0, width, dtype=FLOAT8)
        super().lazy_initialization(like, like)  # type: ignore[misc]
        self.scales = torch.ones(2 * heads, device=key_states.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.scales)

    def update(
        self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, G, n, D] behind the last token; returns all slots, 8-bit ones in a step."""
        is_step = self._is_of_step()
        states = _side_by_side(key_states, value_states, int(self.is_scaled))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.is_scaled:
            self.scales.copy_(scales_for(states))
            self.is_scaled = True
        elif not is_step and states.shape[2] > 1 and not torch.compiler.is_compiling():
            raised = self._raised(states)
            if raised is not None:
                for mine, new in zip((self.scales, self.keys, self.values), raised, strict=True):
                    mine.copy_(new)
        tokens = states.shape[2]
        slots = torch.arange(tokens, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(tokens)  # in place: a graph knows it by its address
        for mine, new in zip((self.keys, self.values), self._stored(states), strict=True):
            mine.view(torch.uint8).index_copy_(2, slots, new.view(torch.uint8))
        if is_step:
            return self.keys, self.values
        whole: tuple[Tensor, Tensor] = self.read_back(key_states.dtype, self.max_cache_len)
        for part, new in zip(whole, (key_states, value_states), strict=True):
            part.index_copy_(2, slots, new)
        return whole

    def reset(self: Any) -> None:
        """Forget all tokens, and their scales."""
        super().reset()  # type: ignore[misc]
        self.is_scaled = False


def announce(cache: Any, is_step: bool) -> None:
    """Say whether the forward that begins is a decode step, which reads 8 bits as they are."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, Float8):
            layer.serves_step = is_step  # type: ignore[misc]


def fit_layers(cache: Any, full: tuple[bool, ...], in_8_bits: bool, clamped: Clamped) -> None:
    """Let the full-attention layers of a cache store as the setting says; the others stay.

    What is in a layer is stored anew in 8 bits. 8-bit layers with tokens in them stay as they are:
    what they have lost would not come back.
    """
    for i, is_full in enumerate(full[: len(cache.layers)]):
        layer = cache.layers[i]
        if not is_full:
            continue
        if isinstance(layer, Float8):
            layer.clamped = clamped  # type: ignore[misc]
            if not in_8_bits and not _tokens(layer):
                cache.layers[i] = _like(layer, None)
        elif in_8_bits:
            cache.layers[i] = new = _like(layer, cache)
            new.clamped = clamped
            tokens = _tokens(layer)
            if tokens:
                new.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens])
            if isinstance(layer, Carrier):
                attach(cache, i, layer.visionpulse)


def holds_8_bits(cache: Any) -> bool:
    """Whether some layer of a cache, or of None, stores 8 bits."""
    return any(isinstance(layer, Float8) for layer in getattr(cache, "layers", ()))


def _tokens(layer: Any) -> int:
    return int(layer.get_seq_length()) if layer.is_initialized else 0


def _like(layer: Any, cache: Any) -> Any:
    """An empty layer of the same kind: of 8 bits, where the `cache` that it is for is given."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    ours = __name__.rpartition(".")[0]
    kind: Any = next(k for k in type(layer).__mro__ if not k.__module__.startswith(ours))
    in_8_bits = cache is not None
    if kind is DynamicLayer and not getattr(cache, "offloading", False):
        return mixed(Float8Growing if in_8_bits else Growing, kind)()
    if kind is StaticLayer and not getattr(cache, "offloading", False):
        return (mixed(Float8Static, kind) if in_8_bits else kind)(layer.max_cache_len)
    what = "an offloaded cache" if getattr(cache, "offloading", False) else f"a {kind.__name__}"
    raise TypeError(
        f"cache='fp8' stores the full-attention layers of a dynamic or a static cache, got {what}; "
        "pass one of those, or leave cache='fp8' out"
    )
