"""How `generate()` would draw the tokens of a batch, for rows that are at different steps.

`torch.multinomial` of one draw divides by exponential noise and takes the largest. The noise of
each step is drawn once, for all rows, in the order of `generate()`; every row uses that of its own
step, so the tokens are those of `generate()` under the same seed.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from .draws import PURE, WITHOUT_IDS, SeenTokens, is_one_of

# Processors and criteria of transformers that may be asked for one row alone.
ROW_WISE = PURE | {
    "NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor",
    "TopHLogitsWarper",
}  # fmt: skip
CRITERIA = frozenset({
    "EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria"
})  # fmt: skip


class BatchDice:
    """The noise of every step: float32 [B, vocabulary]."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._shape = rows, vocabulary
        self._device = device
        self._states: list[Tensor] = []  # of the generator, before each step
        self._noise: dict[int, Tensor] = {}

    def _generator(self) -> Any:
        if self._device.type != "cuda":
            return torch.default_generator
        index = self._device.index
        return torch.cuda.default_generators[
            torch.cuda.current_device() if index is None else index
        ]

    def at(self, steps: list[int]) -> Tensor:
        """The noise of each row at its own step: [B, vocabulary]."""
        while len(self._states) <= max(steps):
            self._states.append(self._generator().get_state())
            noise = torch.empty(self._shape, device=self._device).exponential_()
            self._noise[len(self._states) - 1] = noise
        return torch.stack([self._noise[step][row] for row, step in enumerate(steps)])

    def forget(self, before: int) -> None:
        """Let go of the noise that no row needs again."""
        for step in [step for step in self._noise if step < before]:
            del self._noise[step]

    def end(self, steps: int) -> None:
        """Leave the generator as `steps` draws leave it."""
        if steps < len(self._states):
            self._generator().set_state(self._states[steps])


class RowDraws:
    """Turns logits of any row and step into scores and tokens."""

    def __init__(self, processors: Any, do_sample: bool, prompt: Tensor) -> None:
        self._processors = [each for each in processors if not isinstance(each, SeenTokens)]
        self._by_ids = not all(is_one_of(each, WITHOUT_IDS) for each in self._processors)
        self._do_sample = do_sample
        self._dice: BatchDice | None = None
        self.ids = list(prompt[:, None])  # of each row [1, n], with the tokens it has said

    def scores(self, logits: Tensor, block: Tensor) -> Tensor:
        """Scores float32 [B, Q, vocabulary] of logits behind the last Q tokens of a block [B, n].

        The first token of a block is the last of each row's own.
        """
        rows, queries, _ = logits.shape
        known = block.shape[1] - queries + 1
        flat: Tensor = logits.to(dtype=torch.float32, copy=True).flatten(0, 1)
        for processor in self._processors:
            if is_one_of(processor, WITHOUT_IDS):
                flat = processor(None, flat)
                continue
            own = [_of_row(processor, row) for row in range(rows)]
            parts = [
                own[row](
                    torch.cat((self.ids[row], block[row : row + 1, 1 : known + i]), dim=1),
                    flat[row * queries + i][None],
                )
                for row in range(rows)
                for i in range(queries)
            ]
            flat = torch.cat(parts)
        return flat.reshape(rows, queries, -1)

    def said(self, scores: Tensor, steps: list[int]) -> Tensor:
        """The tokens [B, Q]; `steps` is the step of each row's first."""
        if not self._do_sample:
            tokens: Tensor = scores.argmax(-1)
            return tokens
        if self._dice is None:
            self._dice = BatchDice(scores.shape[0], scores.shape[2], scores.device)
        noise = [self._dice.at([step + i for step in steps]) for i in range(scores.shape[1])]
        return (scores.softmax(-1) / torch.stack(noise, 1)).argmax(-1)

    def add(self, row: int, tokens: list[int]) -> None:
        """Let a row have said some tokens."""
        if self._by_ids:
            own = self.ids[row]
            self.ids[row] = torch.cat((own, own.new_tensor([tokens])), dim=1)

    def forget(self, before: int) -> None:
        """Let go of what no row needs again."""
        if self._dice is not None:
            self._dice.forget(before)

    def end(self, steps: int) -> None:
        """Leave the dice as `generate()` does after `steps` tokens."""
        if self._dice is not None:
            self._dice.end(steps)


def _of_row(processor: Any, row: int) -> Any:
    """A processor for one row: transformers 5.24 has one whose setting is a tensor over rows."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or len(ignored) == 1:
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = ignored[row : row + 1]
    return own


def refusal_of(processors: Any, criteria: Any) -> str | None:
    """Why a batch cannot be asked row by row."""
    for each, names, what in (
        *((each, ROW_WISE, "processor") for each in processors),
        *((each, CRITERIA, "stopping criterion") for each in criteria),
    ):
        if not isinstance(each, SeenTokens) and not is_one_of(each, names):
            return f"a {what} that may look at all rows, {type(each).__name__}"
    return None
