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

    def rows(self, index: Tensor) -> "Selection":
        """Take rows by an index tensor, in its order and as often as it names them."""
        return self._each(lambda t: t[index])

    def to(self, device: torch.device | str) -> "Selection":
        """Copy to a device; the same object when already there."""
        if self.indices.device == torch.device(device):
            return self
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Selection":
        indices, counts = change(self.indices), change(self.counts)
        mass, mass_mean = change(self.mass), change(self.mass_mean)
        return Selection(indices, counts, mass, mass_mean, self.trusted)
