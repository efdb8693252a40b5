"""The arguments of a decode step, and what they are for the tokens of a round that it begins."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import registry
from .conversation import Conversation
from .sliding_layers import BEFORE
from .visual_positions import has_features

MASK, FULL = "attention_mask", "full_attention"  # the mask, or a dict of it by kind of layer
_POSITIONS = ("position_ids", "cache_position")  # [.., 1], one more for each token
_KINDS = ("token_type_ids", "mm_token_type_ids")  # [1, 1], or [1, keys]
_EXTRAS = ("output_attentions", "output_hidden_states")


class Request(NamedTuple):
    """One token of one row, behind a cache."""

    named: dict[str, Any]
    cache: Any
    conversation: Conversation
    length: int  # entries of the cache
    token: Tensor  # [1, 1]

    def of_all(self, tokens: int) -> "RoundArguments":
        """The arguments for a round of so many tokens; that of the request is the first."""
        whole: dict[str, Tensor] = {}
        moving: dict[str, Sequence[Any]] = {}
        checked: dict[str, Any] = {}
        mask = self.named.get(MASK)
        by_kind = isinstance(mask, dict)
        if isinstance(mask, dict):
            mask = mask[FULL]
        if mask is not None and mask.dim() == 4:
            masks = _masks(mask, self.length, tokens)
            each = [masks, *_apart(masks, tokens, 2)]
            checked[MASK], *moving[MASK] = [{FULL: one} for one in each] if by_kind else each
        elif mask is not None:
            whole[MASK] = pad(mask, (0, tokens - 1), value=1)
        for name in _KINDS:
            value = self.named.get(name)
            if value is not None and value.shape[1] == 1:
                checked[name] = value.expand(-1, tokens)  # the same for each
            elif value is not None:  # of all tokens; those of a draft are text
                whole[name] = pad(value, (0, tokens - 1))
        for name in _POSITIONS:
            value = self.named.get(name)
            if value is not None:
                checked[name] = places = value + _steps(tokens, value.device)
                is_fixed = self.conversation.capacity is not None
                moving[name] = _apart(places, tokens, -1) if is_fixed else places.split(1, dim=-1)
        return RoundArguments(self.named, whole, moving, checked)


class RoundArguments(NamedTuple):
    """The arguments of one token of one row, and of those behind it."""

    named: dict[str, Any]
    whole: dict[str, Tensor]  # [1, keys]: a token's forward gets those of the keys it sees
    moving: dict[str, Sequence[Any]]  # of each token
    checked: dict[str, Any]  # [.., tokens]

    def step(self, number: int, token: Tensor) -> dict[str, Any]:
        """Those of draft step `number` with its token [1, 1]."""
        if not number:
            return self.named
        named = {**self.named, "input_ids": token}
        for name, value in self.whole.items():
            named[name] = value.narrow(1, 0, self.named[name].shape[1] + number)
        for name, values in self.moving.items():
            named[name] = values[number]
        return named

    def check(self, ids: Tensor) -> dict[str, Any]:
        """Those of the check of ids [1, tokens]; it gives the logits of all."""
        named = {**self.named, **self.whole, **self.checked, "input_ids": ids}
        if "logits_to_keep" in named:
            named["logits_to_keep"] = 0
        return named


def _apart(values: Tensor, tokens: int, dim: int) -> list[Tensor]:
    """Those of each token, all of one layout: a graph would be made anew for another."""
    parts = (values.narrow(dim, i, 1) for i in range(tokens))
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _masks(mask: Tensor, length: int, tokens: int) -> Tensor:
    """The masks [1, 1, tokens, slots] of a token and those behind it, bool or additive.

    From its own [1, 1, 1, slots], behind `length` tokens in a static cache.
    """
    steps, slots = _steps(tokens, mask.device), _steps(mask.shape[-1], mask.device)
    new = (slots > length) & (slots <= length + steps[:, None])
    return mask | new if mask.dtype == torch.bool else mask.masked_fill(new, 0)


@functools.lru_cache
def _steps(tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(tokens, device=device)


def request_of(named: dict[str, Any], cache: Any, conversation: Conversation) -> Request | str:
    """A call of the model as a step to run ahead of, or why it is none."""
    ids, length = named.get("input_ids"), int(cache.get_seq_length())
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return "no step of one token"
    if ids.shape[0] != 1:
        return f"a batch of {ids.shape[0]} rows"
    if any(named.get(name) for name in _EXTRAS) or named.get("return_dict") is False:
        return "a step that gives attentions, hidden states or a tuple"
    mask, slots = named.get(MASK), conversation.capacity
    if isinstance(mask, dict) and mask.keys() == {FULL}:
        mask = mask[FULL]
    if mask is not None and not (
        isinstance(mask, Tensor)
        and (
            (mask.dim() == 2 and mask.shape[1] == length + 1)
            or (slots is not None and mask.shape == (1, 1, 1, slots))
        )
    ):
        return "a mask that is not one number a key"
    if has_features(named) or named.get("inputs_embeds") is not None:
        return "a step with a picture"  # sizes that go with one may stay
    for name in _POSITIONS:
        if named.get(name) is not None and named[name].shape[-1] != 1:
            return f"a step whose {name} is not of one token"
    return Request(named, cache, conversation, length, ids)


class BatchRequest(NamedTuple):
    """One token of each row, behind a prompt [B, n]."""

    named: dict[str, Any]
    visible: Tensor  # bool [B, n], the keys of the prompt
    is_additive: bool  # the mask, as eager attention takes it
    window: int | None  # of the layers whose attention slides, if any

    def rows_of(self, numbers: list[Any]) -> Tensor:
        """Numbers of the host, of each row, where the tokens are."""
        return torch.tensor(numbers, device=self.visible.device)

    def block(self, ids: Tensor, first: Tensor, size: int) -> tuple[dict[str, Any], Tensor]:
        """The arguments for ids [B, Q] and their slots [B, Q] among `size`.

        The first token of each row lies `first` [B] places behind the prompt.
        """
        width, queries = self.visible.shape[1], ids.shape[1]
        ahead = first[:, None] + torch.arange(queries, device=first.device)  # [B, Q]
        slots = ahead + width
        seen = pad(self.visible, (0, size - width), value=True)
        places = torch.arange(size, device=slots.device)
        mask = (seen[:, None] & (places <= slots[:, :, None]))[:, None]  # [B, 1, Q, size]
        named = {**self.named, "input_ids": ids, "position_ids": self.named["position_ids"] + ahead}
        if self.window is None:
            named["attention_mask"] = self._mask(mask)
        else:
            near = mask & (places > slots[:, None, :, None] - self.window)
            begin = max(width - (self.window - 1 + BEFORE), 0)  # what the layers hold
            named["attention_mask"] = {
                "full_attention": self._mask(mask),
                "sliding_attention": self._mask(near[..., begin:]),
            }
        for name in _KINDS:
            if named.get(name) is not None:
                named[name] = named[name][:, -1:].expand(-1, queries)
        if "logits_to_keep" in named:
            named["logits_to_keep"] = 0
        return named, slots

    def _mask(self, seen: Tensor) -> Tensor:
        """A mask [B, 1, Q, N] as the model's attention takes it."""
        if not self.is_additive:
            return seen
        low = torch.finfo(torch.float32).min
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, low)


def batch_request_of(named: dict[str, Any], width: int, decoder_config: Any) -> BatchRequest:
    """The call that `generate()` would make behind a prompt of `width`, for blocks of tokens."""
    named = {name: value for name, value in named.items() if name != "cache_position"}
    visible = named["attention_mask"][:, :width].bool()
    slides = "sliding_attention" in (getattr(decoder_config, "layer_types", None) or ())
    return BatchRequest(
        named, visible, registry.base_name(decoder_config) == "eager",
        decoder_config.sliding_window if slides else None,
    )  # fmt: skip
