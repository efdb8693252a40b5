"""A trace laid out for the eye: pictures with their grids, and what each step kept on them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .record import Trace

Pixels = NDArray[np.uint8]
Text = Callable[[int], str]


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture or a video frame with the grid of its visual tokens, in reading order."""

    rows: int
    columns: int
    pixels: Pixels | None = None  # [height, width, 3]
    name: str = ""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a grid has at least one cell, got {self.rows} x {self.columns}")
        shape = None if self.pixels is None else self.pixels.shape
        if shape is not None and (len(shape) != 3 or shape[2] != 3):
            raise ValueError(f"pixels must be uint8 [height, width, 3], got {shape}")

    @property
    def tokens(self) -> int:
        """Visual tokens of this picture."""
        return self.rows * self.columns


@dataclass(frozen=True, eq=False)
class Frame:
    """What one anchor kept in one step."""

    step: int
    token: int
    mass: float
    mass_mean: float
    kept: NDArray[np.int64]  # places 0 .. n_visual - 1, ascending


@dataclass(frozen=True, eq=False)
class Told:
    """One row of one conversation."""

    conversation: int
    row: int
    n_visual: int
    shown: tuple[Shown, ...]
    frames: dict[int, list[Frame]]  # by anchor layer

    def often(self, layer: int) -> NDArray[np.int64]:
        """How many steps kept each visual token, [n_visual]."""
        kept = [frame.kept for frame in self.frames[layer]]
        places = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        return np.bincount(places, minlength=self.n_visual)


def sequences(
    trace: Trace, shown: Sequence[Shown] | dict[tuple[int, int], Sequence[Shown]] | None = None
) -> Iterator[Told]:
    """The rows of a trace, each with its pictures.

    `shown` is a list for all rows, or a list by (conversation, row); without it every run of visual
    tokens is drawn as a near-square grid.
    """
    frames: dict[tuple[int, int], dict[int, list[Frame]]] = {}
    counts: dict[tuple[int, int], int] = {}
    for entry in trace:
        key = (entry.conversation, entry.row)
        places = _places(trace.spans[key], entry.kept)
        frame = Frame(entry.step, entry.token, entry.mass, entry.mass_mean, places)
        frames.setdefault(key, {}).setdefault(entry.layer, []).append(frame)
        counts[key] = max(counts.get(key, 0), entry.n_visual)
    if not frames:
        raise ValueError(
            "the trace holds no step; generate under patch(model, record=True) with a picture "
            "in the prompt"
        )
    for key, by_layer in frames.items():
        given = shown.get(key) if isinstance(shown, dict) else shown
        total = sum(end - begin for begin, end in trace.spans[key])
        pictures = tuple(given) if given is not None else _grids(trace.spans[key])
        if sum(picture.tokens for picture in pictures) != total:
            sizes = " + ".join(f"{p.rows} x {p.columns}" for p in pictures)
            raise ValueError(
                f"conversation {key[0]} row {key[1]} has {total} visual tokens, the pictures "
                f"given have {sizes}; give the grid of tokens after merging, in the order of "
                "the prompt"
            )
        yield Told(*key, max(total, counts[key]), pictures, by_layer)


def _places(spans: Sequence[tuple[int, int]], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Slots of the row as places among its visual tokens."""
    begins = np.array([begin for begin, _ in spans], np.int64)
    sizes = np.array([end - begin for begin, end in spans], np.int64)
    before = np.concatenate(([0], sizes.cumsum()[:-1]))
    run = np.searchsorted(begins, positions, side="right") - 1
    places: NDArray[np.int64] = positions - begins[run] + before[run]
    return places


def _grids(spans: Sequence[tuple[int, int]]) -> tuple[Shown, ...]:
    """Each run of visual tokens as the most square grid that holds it exactly."""

    def grid(n: int) -> tuple[int, int]:
        rows = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
        return rows, n // rows

    return tuple(Shown(*grid(end - begin)) for begin, end in spans)


def text_of(tokenizer: Any) -> Text:
    """A token as a person reads it, from a tokenizer, a function, or as its number."""
    if tokenizer is None:
        return lambda token: f"#{token}" if token >= 0 else ""
    decode = getattr(tokenizer, "decode", None)
    if decode is not None:
        return lambda token: decode([token]) if token >= 0 else ""
    call: Text = tokenizer
    return lambda token: call(token) if token >= 0 else ""


def picture_from(path: str | PathLike[str]) -> Pixels:
    """Read a picture file as pixels; needs pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading a picture file needs pillow: pip install pillow; or pass pixels as an array"
        ) from error
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.uint8)
