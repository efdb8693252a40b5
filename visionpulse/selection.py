"""What an anchor kept: the one object that crosses layers, always on the device."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """The kept visual tokens of each row, and the mass that set their count."""

    indices: Tensor  # int32 [B, K_max], ascending, -1 padded; logical positions
    counts: Tensor  # int32 [B]
    mass: Tensor  # float32 [B], the largest of the heads
    mass_mean: Tensor  # float32 [B]
    # Made by a backend, so the values need no check; one made by hand is checked when used.
    trusted: bool = field(default=False, repr=False)

    @classmethod
    def empty(
        cls,
        rows: int,
        k_max: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Selection":
        """Buffers for `decode(..., selection=)` and `select`, with no token kept yet."""
        indices = torch.full((rows, k_max), -1, dtype=torch.int32, device=device)
        counts = torch.zeros(rows, dtype=torch.int32, device=device)
        mass, mass_mean = (torch.zeros(rows, dtype=dtype, device=device) for _ in range(2))
        return cls(indices, counts, mass, mass_mean, trusted=True)

    def first(self, rows: int) -> "Selection":
        """Give the first rows alone, over the same memory."""
        return self._each(lambda t: t[:rows])

    def rows(self, index: Tensor) -> "Selection":
        """Take rows by an index tensor, in its order and as often as it names them."""
        return self._each(lambda t: t[index])

    def query(self, number: int, queries: int) -> "Selection":
        """The rows of one query of several, [B]; views, not copies."""
        return self if queries == 1 else self._each(lambda t: t[number::queries])

    def to(self, device: torch.device | str) -> "Selection":
        """Copy to a device; the same object when already there."""
        if self.indices.device == torch.device(device):
            return self
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Selection":
        indices, counts = change(self.indices), change(self.counts)
        mass, mass_mean = change(self.mass), change(self.mass_mean)
        return Selection(indices, counts, mass, mass_mean, self.trusted)
