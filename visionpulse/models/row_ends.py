"""The tokens of each row of a batch, and where it ends, as `generate()` would say."""

from typing import Any

import torch
from torch import Tensor

from .draws import is_one_of


class RowEnds:
    """The rows of one `generate()`; a row that has ended takes no token more."""

    def __init__(self, prompt: Tensor, criteria: Any, config: Any, streamer: Any) -> None:
        self.prompt = prompt  # [B, n]
        self.rows, self.width = prompt.shape
        self.tokens: list[list[int]] = [[] for _ in range(self.rows)]
        self.left = [True] * self.rows
        self._pad = config._pad_token_tensor
        self._most = config.max_length - self.width
        self._ends = {
            int(token)
            for each in criteria if hasattr(each, "eos_token_id")
            for token in each.eos_token_id.flatten().tolist()
        }  # fmt: skip
        known = frozenset(("EosTokenCriteria", "MaxLengthCriteria"))
        self._others = [each for each in criteria if not is_one_of(each, known)]
        self._streamer = streamer
        self._streamed = 0

    @property
    def counts(self) -> list[int]:
        """Tokens of each row."""
        return [len(tokens) for tokens in self.tokens]

    @property
    def are_left(self) -> bool:
        """Whether a row has not ended."""
        return any(self.left)

    @property
    def steps_taken(self) -> int:
        """Steps that every row has taken, or would have had it not ended."""
        counts = self.counts
        open_ = [count for count, left in zip(counts, self.left, strict=True) if left]
        return min(open_) if open_ else max(counts)

    def take(self, said: list[list[int]]) -> list[int]:
        """Give tokens to the rows that are left; how many each took."""
        taken = [self._take(row, tokens) for row, tokens in enumerate(said)]
        self._stream()
        return taken

    def _take(self, row: int, said: list[int]) -> int:
        own, before = self.tokens[row], len(self.tokens[row])
        for token in said:
            if not self.left[row]:
                break
            own.append(token)
            is_last = token in self._ends or len(own) >= self._most
            self.left[row] = not (is_last or self._is_stopped(row))
        return len(own) - before

    def _is_stopped(self, row: int) -> bool:
        if not self._others:
            return False
        ids = torch.cat((self.prompt[row], self.prompt.new_tensor(self.tokens[row])))[None]
        return any(bool(each(ids, None)) for each in self._others)

    def _stream(self) -> None:
        """Give the streamer each step that all rows have taken, in order."""
        if self._streamer is None:
            return
        pad = 0 if self._pad is None else int(self._pad)
        for step in range(self._streamed, self.steps_taken):
            tokens = [own[step] if step < len(own) else pad for own in self.tokens]
            self._streamer.put(torch.tensor(tokens))
        self._streamed = self.steps_taken

    def finish(self) -> Tensor:
        """The sequences [B, n + steps], padded behind each end."""
        if self._streamer is not None:
            self._streamer.end()
        steps, pad = self.steps_taken, 0 if self._pad is None else int(self._pad)
        tokens = [own + [pad] * (steps - len(own)) for own in self.tokens]
        return torch.cat((self.prompt, self.prompt.new_tensor(tokens)), dim=1)
