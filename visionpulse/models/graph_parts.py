"""The forwards of a round as compiled graphs, where `generate()` compiles: a draft step, a check.

Each is of one shape: a step of one token, a check of a fixed number of tokens. What a thread's
forward does is baked into its graph, so it is named among the arguments, which a graph checks.
"""

from collections.abc import Callable
from typing import Any

import torch

from .mode import Mode


class GraphParts:
    """A model's forward, compiled for each part that it plays."""

    def __init__(self, forward: Callable[..., Any], mode: Mode, config: dict[str, Any]) -> None:
        self._forward, self._mode = forward, mode
        self._compiled: Callable[..., Any] = torch.compile(_play, **config)
        self._names: dict[Any, str] = {}
        self.is_new = False  # some graph was asked for the first time: its seconds tell nothing

    def __call__(self, **named: Any) -> Any:
        """Run the graph of the part that this thread's forward plays."""
        mode = self._mode
        part = mode.part, mode.roles, named["input_ids"].shape, mode.refusal, mode.is_at_end
        name = self._names.get(part)
        if name is None:
            name = self._names[part] = f"part {len(self._names)}"
            self.is_new = True
        return self._compiled(name, self._forward, named)


def _play(part: str, forward: Callable[..., Any], named: dict[str, Any]) -> Any:
    """The forward; the comparison makes the graph that of one part."""
    return forward(**named) if part else None
