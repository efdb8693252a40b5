"""The arguments of a decode step, and what they are for the tokens of a round that it begins."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conversation import Conversation
from .visual_positions import has_features

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

    def step(self, number: int, token: Tensor) -> dict[str, Any]:
        """The arguments of draft step `number` with its token [1, 1]."""
        return self._with(token, number, 1)

    def whole(self, ids: Tensor) -> dict[str, Any]:
        """The arguments of the check of ids [1, n]; it gives the logits of all."""
        named = self._with(ids, 0, ids.shape[1])
        return named | {"logits_to_keep": 0} if "logits_to_keep" in named else named

    def _with(self, ids: Tensor, first: int, count: int) -> dict[str, Any]:
        """Arguments for `count` tokens, `first` places behind the token of the request."""
        named = dict(self.named)
        named["input_ids"] = ids
        mask = named.get("attention_mask")
        if mask is not None:
            more = mask.new_ones(1, first + count - 1)
            named["attention_mask"] = torch.cat((mask, more), dim=1)
        for name in _POSITIONS:
            value = named.get(name)
            if value is not None:
                named[name] = value + torch.arange(first, first + count, device=value.device)
        for name in _KINDS:
            value = named.get(name)
            if value is not None and value.shape[1] == 1:
                named[name] = value.expand(-1, count)
            elif value is not None:  # of all tokens; those of a draft are text
                more = value.new_zeros(1, first + count - 1)
                named[name] = torch.cat((value, more), dim=1)
        return named


def request_of(named: dict[str, Any], cache: Any, conversation: Conversation) -> Request | str:
    """A call of the model as a step to run ahead of, or why it is none."""
    ids, length = named.get("input_ids"), int(cache.get_seq_length())
    if not isinstance(ids, Tensor) or ids.shape[1:] != (1,):
        return "no step of one token"
    if ids.shape[0] != 1:
        return f"a batch of {ids.shape[0]} rows"
    if any(named.get(name) for name in _EXTRAS) or named.get("return_dict") is False:
        return "a step that gives attentions, hidden states or a tuple"
    mask = named.get("attention_mask")
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length + 1
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
        seen = torch.nn.functional.pad(self.visible, (0, size - width), value=True)
        places = torch.arange(size, device=slots.device)
        mask = (seen[:, None] & (places <= slots[:, :, None]))[:, None]  # [B, 1, Q, size]
        named = {**self.named, "input_ids": ids, "position_ids": self.named["position_ids"] + ahead}
        named["attention_mask"] = mask
        if self.is_additive:
            low = torch.finfo(torch.float32).min
            named["attention_mask"] = torch.zeros(mask.shape, device=mask.device).masked_fill_(
                ~mask, low
            )
        for name in _KINDS:
            if named.get(name) is not None:
                named[name] = named[name][:, -1:].expand(-1, queries)
        if "logits_to_keep" in named:
            named["logits_to_keep"] = 0
        return named, slots


def batch_request_of(named: dict[str, Any], width: int, attention: str) -> BatchRequest:
    """The call that `generate()` would make behind a prompt of `width`, for blocks of tokens."""
    named = {name: value for name, value in named.items() if name != "cache_position"}
    visible = named["attention_mask"][:, :width].bool()
    return BatchRequest(named, visible, attention == "eager")
