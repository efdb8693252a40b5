"""What an attention mask of transformers leaves visible."""

import warnings
from typing import Any

import torch
from torch import Tensor


def visible_keys(mask: Tensor) -> Tensor:
    """What the last query of a mask sees: bool [B, N].

    Masks are bool or additive [B, 1, Q, N], or 0 and 1 [B, N].
    """
    last = mask if mask.dim() == 2 else mask[:, 0, -1]
    if last.is_floating_point():
        return last > torch.finfo(last.dtype).min / 2  # additive: 0 where visible
    return last != 0


def row_cuts(mask: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Starts and lengths, int32 [B], of the run of keys that a decode mask leaves visible.

    Device arithmetic only: nothing is read back.
    """
    if mask is None:
        return None, None
    visible = visible_keys(mask).to(torch.int8).expand(rows, -1)
    starts = visible.argmax(1).to(torch.int32)
    return starts, starts + visible.sum(1, dtype=torch.int32)


def has_holes(mask: Any, total: int) -> bool:
    """Whether some row hides keys behind visible ones, which starts and lengths cannot say.

    Reads the device: for a prefill only.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        if mask is not None:
            warnings.warn("an unknown kind of attention mask: decode stays dense", stacklevel=2)
        return mask is not None
    visible = visible_keys(mask)[:, :total].to(torch.int8)  # [B, total], 0..0 1..1 without a hole
    return bool((visible.diff(dim=1) < 0).any() | (visible[:, -1] == 0).any())
