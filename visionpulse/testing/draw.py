"""Random tensors with the same bits on every machine, so that all machines test the same problems.

Of numpy's random numbers only the integers of a bit generator are promised to stay, from version
to version and CPU to CPU: `Generator.standard_normal` may change its algorithm, and torch's own
numbers depend on the vector instructions at hand. So everything is made from those integers by
steps that round the same everywhere, which logarithms and cosines do not.
"""

import numpy as np
import torch
from torch import Tensor

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Draws:
    """A stream of random tensors from a seed."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def _raw(self, *shape: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
        count = int(np.prod(shape, dtype=np.int64))
        return self._bits.random_raw(count).reshape(shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers of mean 0 and variance 1: twelve uniform ones added, so at most 6 away from 0.

        The sum is one of integers, so exact in any order, and rounds once.
        """
        raw = self._raw(6, *shape)  # two numbers of 32 bits each
        total = (raw & _LOW).sum(0) + (raw >> _HALF).sum(0)
        centred = total.astype(np.float64) - 6 * (2.0**32 - 1)
        return torch.as_tensor(centred * 2.0**-32).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), float32: multiples of 2^-24."""
        return torch.as_tensor((self._raw(*shape) >> np.uint64(40)).astype(np.float32)) * 2.0**-24

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers of low <= n < high, int64; a range far below 2^32 is filled evenly."""
        scaled = (self._raw(*shape) >> _HALF) * np.uint64(high - low) >> _HALF
        return torch.as_tensor(scaled.astype(np.int64) + low)

    def refill(self, model: torch.nn.Module, std: float, *, embedding: float | None = None) -> None:
        """Draw the weights of a model again, with a deviation of their own for embeddings if given.

        What is constant stays, as the ones of a norm.
        """
        for name, weight in model.named_parameters():
            values = weight.detach()
            if bool((values != values.flatten()[0]).any()):
                scale = embedding if embedding is not None and "embed" in name else std
                values.copy_(self.normal(*weight.shape) * scale)

    def permutation(self, count: int) -> Tensor:
        """The integers below `count` in random order, int64."""
        return torch.from_numpy(np.argsort(self._raw(count), kind="stable"))
