"""Continuous batching of transformers puts its own attention over its own pages on a model.

A patched model would decode dense without a word, so it is refused where it begins.
"""

from typing import Any

from .patched_model import PatchedModel

_ENTRY = "init_continuous_batching"  # `generate_batch` and the context manager go through it


class ContinuousBatching:
    """The refusal on one patched model."""

    def __init__(self, patched: PatchedModel) -> None:
        self._model = patched.anatomy.model
        original = getattr(self._model, _ENTRY, None)
        if original is None:
            return

        def begin(*args: Any, **kwargs: Any) -> Any:
            if patched.is_paused:
                return original(*args, **kwargs)
            raise NotImplementedError(
                "generate_batch() replaces the attention of a patched model, so nothing would be "
                "pruned; use generate() with a batch, serve with vLLM, or run it dense: "
                "with session.paused()"
            )

        setattr(self._model, _ENTRY, begin)

    def end(self) -> None:
        """Leave the model's own method."""
        self._model.__dict__.pop(_ENTRY, None)
