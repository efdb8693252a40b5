"""How `generate()` turns logits into a token, so that a draft does the same with the same dice.

A draft that is drawn otherwise is only accepted less often: nothing here decides what is said.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Processors of transformers that look at one row alone, keep no state and read no device.
PURE = frozenset({
    "EpsilonLogitsWarper", "EtaLogitsWarper", "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor",
    "LogitNormalization", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper", "RepetitionPenaltyLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper",
    "TopPLogitsWarper", "TypicalLogitsWarper",
})  # fmt: skip
# Those of them that do not look at the tokens: any number of rows and places at once.
WITHOUT_IDS = frozenset({
    "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization",
    "MinPLogitsWarper", "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper",
    "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
})  # fmt: skip


def is_one_of(item: Any, names: frozenset[str]) -> bool:
    """Whether an object is of a class of transformers with one of these names, and no subclass."""
    kind = type(item)
    return kind.__name__ in names and kind.__module__.split(".")[0] == "transformers"


class SeenTokens:
    """Stands first among the processors of a `generate()`, and sees the tokens so far."""

    ids: Tensor | None = None  # [B, n]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the tokens."""
        self.ids = input_ids
        return scores


class _Generation(threading.local):
    """The `generate()` under way in a thread; nothing of it is kept alive."""

    processors: "weakref.ref[Any] | None" = None
    seen: SeenTokens | None = None
    do_sample = False


class TokenDraws:
    """Knows how the `generate()` under way in this thread draws; greedy where none is."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._generation = _Generation()
        self._plain = getattr(model, "_get_logits_processor", None)
        if self._plain is not None:
            model._get_logits_processor = self._listen

    def remove(self) -> None:
        """Give the model its own method back."""
        self._model.__dict__.pop("_get_logits_processor", None)

    def _listen(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = self._plain(generation_config, *args, **kwargs)  # type: ignore[misc]
        generation = self._generation
        generation.seen = SeenTokens()
        processors.insert(0, generation.seen)
        generation.processors = weakref.ref(processors)
        generation.do_sample = bool(generation_config.do_sample)
        return processors

    @contextmanager
    def of(self, length: int, token: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the logits [1, 1, vocabulary] of each draft step to its token [1, 1].

        `length` tokens and `token` [1, 1] lie before the first. The dice are a copy: outside they
        lie as before.
        """
        generation = self._generation
        processors = None if generation.processors is None else generation.processors()
        seen = None if generation.seen is None else generation.seen.ids
        if processors is None or seen is None or seen.shape != (1, length):
            yield _likeliest
            return
        pure = [each for each in processors if is_one_of(each, PURE)]
        if not pure and not generation.do_sample:
            yield _likeliest
            return
        ids = torch.cat((seen, token.to(seen.device)), dim=1)

        def choose(logits: Tensor) -> Tensor:
            nonlocal ids
            scores = logits[:, -1].to(dtype=torch.float32, copy=True)
            for processor in pure:
                scores = processor(ids, scores)
            if generation.do_sample:
                said = torch.multinomial(scores.softmax(-1), num_samples=1)
            else:
                said = scores.argmax(-1, keepdim=True)
            ids = torch.cat((ids, said), dim=1)
            return said

        if not generation.do_sample:
            yield choose
            return
        on_cuda = [token.device] if token.device.type == "cuda" else []
        with torch.random.fork_rng(on_cuda):
            yield choose


def _likeliest(logits: Tensor) -> Tensor:
    token: Tensor = logits.argmax(-1)
    return token
