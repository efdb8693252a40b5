"""Requests with known answers: drawn pictures of three sizes, two at once, none."""

from typing import NamedTuple

from visionpulse.data import trail


class Ask(NamedTuple):
    """One request; `prompt` has one placeholder for each picture, as an engine takes it."""

    prompt: list[int]
    pictures: list[trail.Picture]
    answer: list[int]  # empty where no right answer is known

    @property
    def expanded(self) -> list[int]:
        """The prompt with a placeholder for each cell, as transformers takes it."""
        sides, ids = iter([picture.side for picture in self.pictures]), []
        for token in self.prompt:
            ids += [token] * (next(sides) ** 2 if token == trail.IMAGE else 1)
        return ids


PICTURE = [trail.VISION_START, trail.IMAGE, trail.VISION_END]


def single(seed: int, count: int, side: int, crowd: str = "crowded") -> list[Ask]:
    """Questions about one picture each."""
    return [
        Ask([trail.BOS, *PICTURE, *question.prompt], [picture], question.answer)
        for picture, question in trail.test_set(seed, count, side, crowd)
    ]


def mixed() -> list[Ask]:
    """Nine of all kinds: in one batch their rows differ in length, pictures and visual tokens."""
    made = [*single(5, 4, 20), *single(5, 2, 16), *single(5, 1, 12)]
    text = [trail.BOS, trail.ASK, trail.COLOUR, trail.GLYPH + 5, trail.HAS, trail.MARKSET + 3]
    made.insert(2, Ask(text, [], []))
    (first, _), (second, question) = trail.test_set(9, 2, 14, "sparse")
    two = [trail.BOS, *PICTURE, trail.ASK, *PICTURE, *question.prompt]
    made.append(Ask(two, [first, second], []))
    return made
