"""Finds the visual tokens of a prompt: in its token ids, in its embeddings, or in a user's mask."""

import functools
import re
import threading
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments
from .families import Anatomy

# Keywords that carry a picture into a forward; sizes and masks that go with it do not count.
_FEATURES = re.compile(
    r"pixel_values|mm_encoder_outputs|(image|video)_(embeds|features|hidden_states|patches)"
    r"|images$|videos$"
)


class VisualPositions(threading.local):
    """Which tokens of the prompt that a thread prefills are visual.

    The base model sees the token ids, its decoder sees the cache. What the first shows is kept for
    the second, which follows in the same thread within the same forward.
    """

    mask: Tensor | None = None  # bool [B, Q], the visual tokens that the base model saw
    user_mask: Tensor | None = None  # bool [B, Q], set by the user for the next prefill
    has_user_mask = False  # the prefill under way took its mask from the user
    has_features = False  # pictures are among its arguments
    is_embedded = False  # compared by embeddings, which merged pictures do not equal
    passed_base = False  # the base model has seen this prefill
    has_picture: bool | None = None  # one came with the last prefill; None: no prefill was seen

    def __init__(self, anatomy: Anatomy, base: Arguments) -> None:  # anew in every thread
        self._anatomy = anatomy
        self._base = base

    def read(self, ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the visual tokens in the arguments of the base model."""
        self.passed_base, self.is_embedded = True, False
        self.has_features = self.has_picture = has_features(kwargs)
        if ids is not None:
            visual_ids = torch.tensor(self._anatomy.visual_ids, device=ids.device)
            self.mask = torch.isin(ids, visual_ids)
            return
        embeds = self._base.get("inputs_embeds", args, kwargs)
        kinds = kwargs.get("mm_token_type_ids")
        if embeds is None or embeds.shape[1] == 1:
            self.mask = None
        elif kinds is not None:
            kinds = kinds[:, -embeds.shape[1] :]
            self.mask = (kinds == 1) | (kinds == 2)  # 1 is an image, 2 a video
        else:
            self.mask, self.is_embedded = self._placeholders(embeds), True

    def _placeholders(self, embeds: Tensor) -> Tensor:
        """Positions [B, Q] whose embedding is that of a visual token."""
        embed = self._anatomy.model.get_input_embeddings()
        visual_ids = torch.tensor(self._anatomy.visual_ids, device=embeds.device)
        same: Tensor = embeds[:, :, None] == embed(visual_ids).to(embeds)  # [B, Q, ids, width]
        return same.all(-1).any(-1)

    def visual_mask(self, inputs: Tensor) -> Tensor | None:
        """The visual tokens of `inputs` [B, Q, ...]: by the user, else by the base model."""
        rows, width = inputs.shape[:2]
        mask, self.user_mask = self.user_mask, None
        self.has_user_mask = mask is not None
        if mask is not None:
            if mask.shape[1] != width or rows % mask.shape[0]:
                raise ValueError(
                    f"set_visual_mask got {tuple(mask.shape)}, this prefill is [{rows}, {width}]; "
                    "give one bool per token of the next forward"
                )
            self.has_features = self.has_picture = bool(mask.any())
            return mask.to(inputs.device).repeat_interleave(rows // mask.shape[0], 0)  # beams
        mask = self.mask if self.passed_base else None
        # another shape: the base model was stopped halfway, and this is another forward
        return mask if mask is not None and mask.shape == inputs.shape[:2] else None

    def forget_forward(self) -> None:
        """Drop what the base model showed, when its forward ends."""
        self.mask, self.passed_base = None, False


def has_features(kwargs: dict[str, Any]) -> bool:
    """Whether pictures are among the arguments of a forward."""
    return any(_names_feature(name) and _is_something(part) for name, part in kwargs.items())


@functools.cache
def _names_feature(name: str) -> bool:
    return _FEATURES.search(name) is not None


def _is_something(value: Any) -> bool:
    if isinstance(value, dict):  # encoder outputs by modality, empty for a text turn
        return any(part is not None for part in value.values())
    if isinstance(value, list | tuple | Tensor):
        return len(value) > 0
    return value is not None
