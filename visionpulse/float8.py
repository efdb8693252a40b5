"""How numbers are stored in 8 bits: float8_e4m3fn, and a scale for all of them or for each head."""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of fraction; NaN, but no infinities
LARGEST = torch.finfo(FLOAT8).max  # 448


def stored(x: Tensor, scale: Tensor | None = None, head_axis: int = 1) -> Tensor:
    """Quantise: `x / scale`, held to +-448 and rounded to nearest even; NaN stays NaN.

    `x` is K or V with its KV heads at `head_axis`; `scale`, float32, is one number or [G], and 1
    where it is left out.
    """
    quotient = x.float() if scale is None else x.float() / along(scale, x.dim(), head_axis)
    # clamped first: some versions of torch make NaN of what is too large
    return quotient.clamp(-LARGEST, LARGEST).to(FLOAT8)


def read(
    stored: Tensor,
    scale: Tensor | None = None,
    head_axis: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What stored numbers stand for; exact in float64."""
    wide = stored.to(dtype)
    return wide if scale is None else wide * along(scale.to(dtype), stored.dim(), head_axis)


def along(scale: Tensor, rank: int, head_axis: int) -> Tensor:
    """A scale of one number or [G], shaped to multiply a tensor with its heads at `head_axis`."""
    if scale.numel() == 1:
        return scale.reshape(())
    shape = [1] * rank
    shape[head_axis] = -1
    return scale.view(shape)
