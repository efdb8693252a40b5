"""The layout of a trace: pictures with their grids, and what each step kept on them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int64]
Spans = Sequence[tuple[int, int]]  # of visual tokens, in order
RowKey = tuple[int, int]  # conversation and row
Text = Callable[[int], str]


class TraceRow(NamedTuple):
    """What one anchor kept of one row in one step."""

    conversation: int
    step: int  # decode step since the conversation's last prefill, from 0
    layer: int  # the anchor that selected
    row: int
    token: int  # the token this step read; -1 where the model was given embeddings
    n_visual: int
    mass: float
    mass_mean: float
    kept: Ints  # positions, ascending


@dataclass(frozen=True, eq=False)
class PictureGrid:
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
class KeptStep:
    """What one anchor kept in one step."""

    step: int
    token: int
    mass: float
    mass_mean: float
    kept: Ints  # places 0 .. n_visual - 1, ascending


@dataclass(frozen=True, eq=False)
class RowLayout:
    """One row of one conversation: its pictures, and what each step kept on them."""

    conversation: int
    row: int
    n_visual: int
    pictures: tuple[PictureGrid, ...]
    steps: dict[int, list[KeptStep]]  # by anchor layer

    def often(self, layer: int) -> Ints:
        """How many steps kept each visual token, [n_visual]."""
        kept = [step.kept for step in self.steps[layer]]
        places = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        return np.bincount(places, minlength=self.n_visual)


Pictures = Sequence[PictureGrid] | Mapping[RowKey, Sequence[PictureGrid]]


def layouts(
    rows: Iterable[TraceRow], spans: Mapping[RowKey, Spans], pictures: Pictures | None = None
) -> Iterator[RowLayout]:
    """Lay out the rows of a trace, each with its pictures.

    `pictures` is a list for all rows, or a list by (conversation, row); without it every run of
    visual tokens is drawn as a near-square grid.
    """
    steps: dict[RowKey, dict[int, list[KeptStep]]] = {}
    counts: dict[RowKey, int] = {}
    for row in rows:
        key = (row.conversation, row.row)
        places = _places(spans[key], row.kept)
        step = KeptStep(row.step, row.token, row.mass, row.mass_mean, places)
        steps.setdefault(key, {}).setdefault(row.layer, []).append(step)
        counts[key] = max(counts.get(key, 0), row.n_visual)
    if not steps:
        raise ValueError(
            "the trace holds no step; generate under patch(model, record=True) with a picture "
            "in the prompt"
        )
    for key, by_layer in steps.items():
        of_row = pictures.get(key) if isinstance(pictures, Mapping) else pictures
        total = sum(end - begin for begin, end in spans[key])
        grids = tuple(of_row) if of_row is not None else _grids(spans[key])
        if sum(grid.tokens for grid in grids) != total:
            sizes = " + ".join(f"{grid.rows} x {grid.columns}" for grid in grids)
            raise ValueError(
                f"conversation {key[0]} row {key[1]} has {total} visual tokens, the pictures "
                f"given have {sizes}; give the grid of tokens after merging, in the order of "
                "the prompt"
            )
        yield RowLayout(*key, max(total, counts[key]), grids, by_layer)


def _places(spans: Spans, positions: Ints) -> Ints:
    """Slots of the row as places among its visual tokens."""
    begins = np.array([begin for begin, _ in spans], np.int64)
    sizes = np.array([end - begin for begin, end in spans], np.int64)
    before = np.concatenate(([0], sizes.cumsum()[:-1]))
    run = np.searchsorted(begins, positions, side="right") - 1
    places: Ints = positions - begins[run] + before[run]
    return places


def _grids(spans: Spans) -> tuple[PictureGrid, ...]:
    """Each run of visual tokens as the most square grid that holds it exactly."""

    def grid(n: int) -> tuple[int, int]:
        rows = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
        return rows, n // rows

    return tuple(PictureGrid(*grid(end - begin)) for begin, end in spans)


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
