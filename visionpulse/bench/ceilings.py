"""The limits of this machine, measured in the same run as the times compared with them.

`read` streams bytes, `gather` reads K and V of text and kept tokens where they lie, as a follower
must, `compute` multiplies large matrices. On a CPU both reads are native loops of the widest loads
on torch's count of threads, over cold memory; each takes the fastest of a few orders and prefetch
distances, since CPUs differ. All are bests: a ceiling lowered by a busy neighbour would flatter
what runs below it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..cache import KVCache
from .cost import Roof, Work
from .rows import Ceiling
from .timing import Times, interleaved

_READ_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_SIDE = {"cpu": 1024, "cuda": 8192}
# Keys ahead; below 0 K and V are read in blocks of so many.
_AHEAD = (16, 64, 256, -64, -128)
# Pages of memory that a read in order asks for ahead; 0 leaves it to the hardware.
PAGES_AHEAD = (0, 4, 8)
_PREFIX = "ceiling:"


class Limits(NamedTuple):
    """What was measured in one run."""

    read: Ceiling
    gather: Ceiling
    compute: float  # operations per second of a large product

    @property
    def roof(self) -> Roof:
        """The same limits for the cost model."""
        return Roof(self.read.gb_s * 1e9, self.compute, self.gather.gb_s * 1e9)

    def of(self, work: Work) -> Ceiling:
        """What one op is limited by: bytes in order at `read`, scattered ones at `gather`."""
        if not work.gathered:
            return self.read
        if not work.streamed:
            return self.gather
        seconds = work.streamed / self.read.gb_s + work.gathered / self.gather.gb_s
        return Ceiling(f"{self.read.name} and {self.gather.name}", work.bytes / seconds)


def multiplied_as(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype whose products limit ours: float16 is widened on a CPU.

    Torch's product of float16 matrices is a hundred times slower there.
    """
    return torch.float32 if (kind, dtype) == ("cpu", torch.float16) else dtype


class Ceilings:
    """Variants to interleave with a benchmark's own, and what they say once timed."""

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        row_bytes: int,
        kv: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Gather `positions` [n] of row 0 of a contiguous `kv`, by default random rows."""
        self.device, self.dtype, self.row_bytes = torch.device(device), dtype, row_bytes
        kind = self.device.type
        self._bytes = _READ_BYTES[kind]
        self._data = torch.ones(self._bytes // 4, device=self.device)
        side = _SIDE[kind]
        self._matrix = torch.ones(side, side, device=self.device, dtype=multiplied_as(kind, dtype))
        self._native = kind == "cpu" and _native.failure() is None
        width = max(1, row_bytes // 4)
        rows = self._data[: self._data.numel() // width * width].view(-1, width)
        generator = torch.Generator(self.device).manual_seed(0)
        picked = max(1, len(rows) // 40)
        places = torch.randperm(len(rows) // 2, generator=generator, device=self.device)
        self._rows, self._places = rows, places[:picked].sort().values
        if kv is None or positions is None:
            half = rows.view(1, 1, -1, width)[:, :, : len(rows) // 2 * 2]
            k, v = half.chunk(2, 2)
            self._kv, self._positions = KVCache(k, v), self._places.int()
        else:
            self._kv, self._positions = kv, positions.to(self.device, torch.int32).contiguous()

    def variants(self) -> dict[str, Callable[[int], object]]:
        """What to time, under names that start with `ceiling:`."""

        def gather(ahead: int) -> Callable[[int], object]:
            return lambda _: self._gather(ahead)

        def read(pages: int) -> Callable[[int], object]:
            return lambda _: self._read(pages)

        gathers = {f"gather:{ahead}": gather(ahead) for ahead in _AHEAD}
        if not self._native:
            gathers = {"gather": lambda _: self._rows.index_select(0, self._places)}
        reads = {f"read:{pages}": read(pages) for pages in PAGES_AHEAD}
        if not self._native:
            reads = {"read": read(0)}
        all_ = {
            **reads,
            **gathers,
            "compute": lambda _: self._matrix @ self._matrix,
        }
        return {_PREFIX + name: variant for name, variant in all_.items()}

    def memory(self, name: str) -> Sequence[Tensor] | None:
        """What a variant of ours reads; None for another's."""
        if not name.startswith(_PREFIX):
            return None
        return [self._data] if name.startswith(_PREFIX + "read") else [self._kv.k, self._kv.v]

    def _read(self, pages: int) -> object:
        if self.device.type == "cuda":  # a copy: reads and writes at the rate of the memory
            half = len(self._data) // 2
            return self._data[:half].copy_(self._data[half:])
        if self._native:
            return _native.module().cpu.read_stream(
                self._data.data_ptr(), self._bytes, pages, torch.get_num_threads()
            )
        return self._data.sum()

    def _gather(self, ahead: int) -> object:
        k, v = self._kv.k, self._kv.v
        return _native.module().cpu.read_gathered(
            k, v, self._positions, ahead, torch.get_num_threads()
        )

    @property
    def _gathered(self) -> int:
        if not self._native:
            return self._places.numel() * self._rows.shape[1] * 4
        k = self._kv.k
        return 2 * len(self._positions) * k.shape[1] * k.shape[3] * k.itemsize

    def limits(self, times: dict[str, Times]) -> Limits:
        """What the timed variants say: bytes streamed, bytes gathered, operations per second."""
        kind = "copy" if self.device.type == "cuda" else "read"
        # not the best of all rounds: one round in a hundred finds rows that a neighbour warmed
        gather = min(t.p20 for name, t in times.items() if name.startswith(_PREFIX + "gather"))
        read = min(t.best for name, t in times.items() if name.startswith(_PREFIX + "read"))
        return Limits(
            Ceiling(
                f"{kind} of {self._bytes >> 20} MiB",
                self._bytes / read / 1e9,
            ),
            Ceiling(f"gather of {self.row_bytes}-byte rows", self._gathered / gather / 1e9),
            2 * self._matrix.shape[0] ** 3 / times[_PREFIX + "compute"].best,
        )


def measure(
    device: torch.device | str, dtype: torch.dtype, row_bytes: int = 256, rounds: int = 7
) -> Limits:
    """Measure the limits by themselves."""
    ceilings = Ceilings(device, dtype, row_bytes)
    times = interleaved(ceilings.variants(), rounds, device=device)
    return ceilings.limits(times)
