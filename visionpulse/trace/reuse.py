"""How often the next step wants what earlier steps wanted: what a tier of fast memory would hit.

A cache on the device holds some visual tokens of a row; the others lie elsewhere. A step hits the
tokens that are there when it asks, then its own become the newest and the oldest leave.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layout import Ints
from .record import Trace


class Reuse(NamedTuple):
    """What each entry of a trace wanted that was there; entries in the order of the trace."""

    wanted: Ints  # [E], tokens kept by the step
    again: Ints  # [E], of these also kept by the entry before; -1 in a row's first
    hits: Ints  # [E, sizes], of these in a cache of so many tokens; -1 in a row's first

    @property
    def follows(self) -> NDArray[np.bool_]:
        """Entries that have one before them: the others find every cache empty."""
        return self.again >= 0

    def overlap(self, where: NDArray[np.bool_] | None = None) -> float:
        """Share of wanted tokens that the entry before wanted too."""
        return _share(self.again, self.wanted, self._counted(where))

    def hit_rates(self, where: NDArray[np.bool_] | None = None) -> list[float]:
        """Share of wanted tokens found in a cache of each size."""
        on = self._counted(where)
        return [_share(hits, self.wanted, on) for hits in self.hits.T]

    def _counted(self, where: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        return self.follows if where is None else self.follows & where


def reuse(trace: Trace, sizes: Sequence[Callable[[int], int]]) -> Reuse:
    """Walk each row and layer of a trace with one LRU cache per size.

    A size says from the row's visual tokens how many a cache holds, such as a budget's `bound`.
    """
    entries = len(trace)
    wanted, again = np.zeros(entries, np.int64), np.full(entries, -1)
    hits = np.full((entries, len(sizes)), -1)
    before: dict[tuple[int, int, int], set[int]] = {}
    caches: dict[tuple[int, int, int], list[_Lru]] = {}
    for i, entry in enumerate(trace):
        key = entry.conversation, entry.row, entry.layer
        kept = entry.kept.tolist()
        wanted[i] = len(kept)
        if key not in caches:
            caches[key] = [_Lru(size(entry.n_visual)) for size in sizes]
        found = [cache.ask(kept) for cache in caches[key]]
        if key in before:
            again[i] = len(before[key].intersection(kept))
            hits[i] = found
        before[key] = set(kept)
    return Reuse(wanted, again, hits)


class _Lru:
    """The tokens asked for last, at most so many."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a cache must hold a token at least, got {size}")
        self.size = size
        self.held: OrderedDict[int, None] = OrderedDict()  # oldest first

    def ask(self, tokens: Sequence[int]) -> int:
        """Count the tokens that are there, then keep these as the newest."""
        found = sum(token in self.held for token in tokens)
        for token in tokens:
            self.held[token] = None
            self.held.move_to_end(token)
        while len(self.held) > self.size:
            self.held.popitem(last=False)
        return found


def _share(part: Ints, whole: Ints, on: NDArray[np.bool_]) -> float:
    total = int(whole[on].sum())
    return float(part[on].sum()) / total if total else float("nan")
