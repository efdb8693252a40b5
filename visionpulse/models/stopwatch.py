"""Times parts of a round without waiting: on a GPU by events, read once they have passed."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

Hear = Callable[[float, float], None]  # seconds of the drafts, and of the check


class Stopwatch:
    """Marks three moments of each round; tells the two spans when they are known."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[list[Any], Hear]] = deque()

    def mark(self, device: torch.device) -> Any:
        """This moment, in the device's own order of work."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def add(self, marks: list[Any], hear: Hear) -> None:
        """Take the marks of a round, and whom to tell."""
        self._rounds.append((marks, hear))
        while self._rounds and _has_passed(self._rounds[0][0][-1]):
            (begin, middle, end), hear = self._rounds.popleft()
            hear(_seconds(begin, middle), _seconds(middle, end))


def _has_passed(mark: Any) -> bool:
    return isinstance(mark, float) or bool(mark.query())


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    return float(begin.elapsed_time(end)) / 1e3
