"""The glyph trail: pictures on which every step of an answer needs other visual tokens.

A picture is a grid of cells, one visual token each. A cell shows, in one of eight colours, a key
glyph (left half), a pointer glyph (top right) and one of four marks (bottom right). A *node* is a
colour with a key glyph; it is drawn in 1 to 20 copies scattered over the grid, all with the same
pointer, each with a mark of its own. The nodes of a colour form one path that ends in STOP. A
question names a colour and a glyph; the answer walks the path, six tokens a hop:

    ? colour glyph | HAS marks SUM s TO glyph' | HAS marks SUM s TO glyph'' | ... | ANSWER s END

`marks` (which marks occur on the node) needs all its copies, `glyph'` any one of them; `s`, the
running sum of the numbers of marks modulo 10, and the words between need text alone.
"""

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

CELL = 8  # pixels; a cell is one patch of the vision tower
COLOURS, GLYPHS, MARKS = 8, 16, 4
MOST_COPIES = 20
MOST_HOPS = 6
HOP = 6  # answer tokens of one hop

PAD, BOS, VISION_START, IMAGE, VISION_END, ASK, STOP, END, HAS, SUM, TO, ANSWER = range(12)
COLOUR = 12
GLYPH = COLOUR + COLOURS
DIGIT = GLYPH + GLYPHS
MARKSET = DIGIT + 10  # + bitmask of the marks, 1 .. 15
VIDEO = 63  # unused, but the architecture has it
VOCABULARY = 64
LONGEST_ANSWER = HOP * MOST_HOPS + 3

_COLOUR_NAMES = ("red", "green", "blue", "yellow", "pink", "cyan", "orange", "white")
_PALETTE = np.array(
    [
        [1.0, 0.1, 0.1], [0.1, 1.0, 0.1], [0.15, 0.3, 1.0], [1.0, 1.0, 0.1],
        [1.0, 0.1, 1.0], [0.1, 1.0, 1.0], [1.0, 0.55, 0.1], [0.9, 0.9, 0.9],
    ],
    np.float32,
)  # fmt: skip
_PAPER, _INK, _NOISE = 0.12, 0.78, 0.10  # of full brightness


def _bitmaps(rng: np.random.Generator, count: int, height: int, width: int, apart: int) -> Floats:
    """Draw `count` random bitmaps that differ in at least `apart` pixels, a third of them set."""
    glyphs: list[Floats] = []
    while len(glyphs) < count:
        bits = (rng.random((height, width)) < 0.5).astype(np.float32)
        if 3 * bits.sum() >= bits.size and all(np.abs(bits - f).sum() >= apart for f in glyphs):
            glyphs.append(bits)
    return np.stack(glyphs)


_rng = np.random.default_rng(20260531)
_KEY = _bitmaps(_rng, GLYPHS, CELL, CELL // 2, 11)
_POINTER = _bitmaps(_rng, GLYPHS + 1, CELL // 2, CELL // 2, 5)  # the last is STOP
_MARK = _bitmaps(_rng, MARKS, CELL // 2, CELL // 2, 7)


class Node(NamedTuple):
    """A colour and a glyph, with where it is drawn."""

    glyph: int
    marks: int  # bitmask
    cells: Ints  # its copies


class Picture(NamedTuple):
    """A drawn grid and what is on it."""

    side: int
    pixels: Pixels  # [side * CELL, side * CELL, 3]
    cells: Ints  # [side * side, 4]: colour, key, pointer (GLYPHS is STOP), mark; -1 where blank
    paths: dict[int, list[Node]]  # by colour


class Question(NamedTuple):
    """A question with its answer, token by token."""

    prompt: list[int]
    answer: list[int]
    kinds: list[str]  # of each answer token: word, marks, sum, next
    needs: list[Ints]  # cells that each answer token needs: all copies, a choice of copies, none

    def kinds_of(self, said: Sequence[int]) -> list[str]:
        """Kinds of the tokens that a model said, as far as they are right; "" behind that."""
        pairs = zip(said, self.answer, strict=False)
        right = sum(accumulate((a == b for a, b in pairs), operator.and_))
        return [*self.kinds[:right], *[""] * (len(said) - right)]


def _marks_of(rng: np.random.Generator, copies: int) -> Ints:
    """A mark for each copy: any set of marks, the rarest on a tenth of the copies."""
    rarest = -(-copies // 10)
    kinds = int(rng.integers(1, min(MARKS, copies // rarest) + 1))
    which = rng.permutation(MARKS)[:kinds]
    rest = copies - rarest * kinds
    shares = rng.multinomial(rest, rng.dirichlet(np.full(kinds, 0.5)))
    return rng.permutation(np.repeat(which, rarest + shares))


def draw(
    rng: np.random.Generator, side: int, colours: int, per_colour: int, even: bool = False
) -> Picture:
    """Draw a picture with so many colours and cells per colour.

    Sizes of nodes are log-uniform, so that small ones are as frequent as large ones, or `even`.
    """
    cells = np.full((side * side, 4), -1, np.int64)
    free, at = rng.permutation(side * side), 0
    paths: dict[int, list[Node]] = {}
    for colour in rng.permutation(COLOURS)[:colours].tolist():
        sizes: list[int] = []
        left = per_colour
        while left and len(sizes) < GLYPHS:
            if even:
                copies = int(rng.integers(1, MOST_COPIES + 1))
            else:
                copies = int(np.exp(rng.uniform(0.0, np.log(MOST_COPIES + 1))))
            sizes.append(min(left, copies))
            left -= sizes[-1]
        glyphs = rng.permutation(GLYPHS)[: len(sizes)].tolist()
        path = []
        for glyph, pointer, copies in zip(glyphs, [*glyphs[1:], GLYPHS], sizes, strict=True):
            where, at = free[at : at + copies], at + copies
            marks = _marks_of(rng, copies)
            cells[where] = np.column_stack(np.broadcast_arrays(colour, glyph, pointer, marks))
            path.append(Node(glyph, int(np.bitwise_or.reduce(1 << marks)), where))
        paths[colour] = path
    return Picture(side, _render(rng, cells, side), cells, paths)


def _render(rng: np.random.Generator, cells: Ints, side: int) -> Pixels:
    ink = np.zeros((side * side, CELL, CELL, 3), np.float32)
    on = cells[:, 0] >= 0
    colour, key, pointer, mark = cells[on].T
    right = np.concatenate([_POINTER[pointer], _MARK[mark]], axis=1)
    shape = np.concatenate([_KEY[key], right], axis=2)  # [n, CELL, CELL]
    bright = 1 + 0.1 * rng.standard_normal((int(on.sum()), 1, 1, 1), dtype=np.float32)
    ink[on] = shape[..., None] * _PALETTE[colour][:, None, None] * bright
    image = _PAPER + _INK * ink + _NOISE * rng.standard_normal(ink.shape, dtype=np.float32)
    rows = image.reshape(side, side, CELL, CELL, 3).swapaxes(1, 2)
    return (rows.reshape(side * CELL, side * CELL, 3).clip(0, 1) * 255).astype(np.uint8)


def ask(rng: np.random.Generator, picture: Picture, hops: int) -> Question:
    """Ask for a walk of so many hops, or of a whole path where that is shorter."""
    colour = int(rng.choice(list(picture.paths)))
    path = picture.paths[colour][-hops:]
    answer: list[int] = []
    needs: list[Ints] = []
    nothing, total = np.zeros(0, np.int64), 0
    for i, node in enumerate(path):
        total = (total + node.marks.bit_count()) % 10
        then = GLYPH + path[i + 1].glyph if i + 1 < len(path) else STOP
        answer += [HAS, MARKSET + node.marks, SUM, DIGIT + total, TO, then]
        needs += [nothing, node.cells, nothing, nothing, nothing, node.cells]
    kinds = ["word", "marks", "word", "sum", "word", "next"] * len(path)
    return Question(
        [ASK, COLOUR + colour, GLYPH + path[0].glyph],
        [*answer, ANSWER, DIGIT + total, END],
        [*kinds, "word", "sum", "word"],
        [*needs, nothing, nothing, nothing],
    )


def prefix(side: int) -> list[int]:
    """Token ids of a picture, with what stands around it."""
    return [BOS, VISION_START, *[IMAGE] * (side * side), VISION_END]


FIRST_CELL = 2  # slot of the first visual token of `prefix`


def patches(pictures: Sequence[Picture]) -> Floats:
    """The pictures as a vision tower takes them: [n * side * side, 3 * CELL * CELL] in -1 .. 1."""
    pixels = np.stack([picture.pixels for picture in pictures])
    n, side = len(pictures), pictures[0].side
    cut = pixels.reshape(n, side, CELL, side, CELL, 3).transpose(0, 1, 3, 5, 2, 4)
    scaled: Floats = cut.reshape(n * side * side, -1).astype(np.float32) / 127.5 - 1
    return scaled


CROWDS = ("crowded", "sparse")


def test_set(seed: int, count: int, side: int, crowd: str) -> list[tuple[Picture, Question]]:
    """Pictures with one question each of 2 to 6 hops; pictures of another seed are other pictures.

    Crowded: all eight colours fill the grid. Sparse: one colour on an eighth of it. Nodes of 1 to
    20 copies are equally frequent.
    """
    if crowd not in CROWDS:
        raise ValueError(f"crowd must be one of {CROWDS}, got {crowd!r}")
    rng = np.random.default_rng([seed, side, CROWDS.index(crowd)])
    cells = side * side
    colours, per_colour = (COLOURS, cells // COLOURS) if crowd == "crowded" else (1, cells // 8)
    drawn = []
    for _ in range(count):
        picture = draw(rng, side, colours, per_colour, even=True)
        drawn.append((picture, ask(rng, picture, int(rng.integers(2, MOST_HOPS + 1)))))
    return drawn


def words(ids: Sequence[int]) -> list[str]:
    """The tokens as a person reads them."""
    return [_word(int(i)) for i in ids]


_WORDS = (
    "<pad>", "<bos>", "<picture>", "<cell>", "</picture>", "?", "STOP", "END", "HAS", "SUM",
    "TO", "ANSWER",
)  # fmt: skip


def _word(token: int) -> str:
    if token < COLOUR:
        return _WORDS[token]
    if token < GLYPH:
        return _COLOUR_NAMES[token - COLOUR]
    if token < DIGIT:
        return chr(ord("A") + token - GLYPH)
    if token < MARKSET:
        return str(token - DIGIT)
    marks = token - MARKSET
    return "{" + "".join(str(m + 1) for m in range(MARKS) if marks >> m & 1) + "}"
