"""The limits of this machine, measured in the same run as the times compared with them.

`read` streams more bytes than any cache holds, `gather` reads rows of one token and head at random
places, as a follower must, `compute` multiplies large matrices. All are bests: a ceiling lowered by
a busy neighbour would flatter what runs below it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cost import Roof
from .rows import Ceiling
from .timing import Times, interleaved

_READ_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_SIDE = {"cpu": 1024, "cuda": 8192}


class Limits(NamedTuple):
    """What was measured in one run."""

    read: Ceiling
    gather: Ceiling
    compute: float  # operations per second of a large product

    @property
    def roof(self) -> Roof:
        """The same limits for the cost model."""
        return Roof(self.read.gb_s * 1e9, self.compute, self.gather.gb_s * 1e9)


class Ceilings:
    """Variants to interleave with a benchmark's own, and what they say once timed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, row_bytes: int) -> None:
        self.device, self.dtype, self.row_bytes = torch.device(device), dtype, row_bytes
        kind = self.device.type
        self._bytes = _READ_BYTES[kind]
        self._data = torch.ones(self._bytes // 4, device=self.device)
        width = max(1, row_bytes // 4)
        self._rows = self._data[: self._data.numel() // width * width].view(-1, width)
        generator = torch.Generator(self.device).manual_seed(0)
        picked = max(1, len(self._rows) // 20)
        places = torch.randperm(len(self._rows), generator=generator, device=self.device)
        self._places = places[:picked].sort().values
        side = _SIDE[kind]
        self._matrix = torch.ones(side, side, device=self.device, dtype=dtype)

    def variants(self) -> dict[str, Callable[[int], object]]:
        """What to time, under names that start with `ceiling:`."""
        return {
            "ceiling:read": lambda _: self._read(),
            "ceiling:gather": lambda _: self._rows.index_select(0, self._places),
            "ceiling:compute": lambda _: self._matrix @ self._matrix,
        }

    def _read(self) -> Tensor:
        if self.device.type == "cuda":  # a copy: reads and writes at the rate of the memory
            half = len(self._data) // 2
            return self._data[:half].copy_(self._data[half:])
        return self._data.sum()

    def limits(self, times: dict[str, Times]) -> Limits:
        """What the timed variants say: bytes streamed, bytes gathered, operations per second."""
        kind = "copy" if self.device.type == "cuda" else "read"
        gathered = self._places.numel() * self._rows.shape[1] * 4
        return Limits(
            Ceiling(
                f"{kind} of {self._bytes >> 20} MiB",
                self._bytes / times["ceiling:read"].best / 1e9,
            ),
            Ceiling(
                f"gather of {self.row_bytes}-byte rows",
                gathered / times["ceiling:gather"].best / 1e9,
            ),
            2 * self._matrix.shape[0] ** 3 / times["ceiling:compute"].best,
        )


def measure(
    device: torch.device | str, dtype: torch.dtype, row_bytes: int = 256, rounds: int = 7
) -> Limits:
    """Measure the limits by themselves."""
    ceilings = Ceilings(device, dtype, row_bytes)
    times = interleaved(ceilings.variants(), rounds, device=device)
    return ceilings.limits(times)
