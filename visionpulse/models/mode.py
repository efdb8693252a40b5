"""What a thread's forward of a lossless model does."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from .layer_roles import LayerRoles


class Part(Enum):
    """What a forward of a lossless model does."""

    NEITHER = "neither"  # dense, one token at a time
    DRAFT = "draft"  # sparse
    CHECK = "check"  # dense, all tokens of a round


class Mode(threading.local):
    """The part that a thread's forward plays, and why it does not run ahead."""

    part = Part.NEITHER
    roles: LayerRoles | None = None  # of a draft, where a policy chose the way
    refusal = ""
    graphs: Any = None  # the parts of a round, where the caller compiles
    is_at_end = False  # of a static cache: no slot is left for a draft

    @property
    def drafts(self) -> bool:
        """Whether it drafts."""
        return self.part is Part.DRAFT

    @property
    def checks(self) -> bool:
        """Whether it checks."""
        return self.part is Part.CHECK

    @contextmanager
    def through(self, graphs: Any) -> Iterator[None]:
        """Let forwards be these graphs."""
        before, self.graphs = self.graphs, graphs
        try:
            yield
        finally:
            self.graphs = before

    @contextmanager
    def of(self, part: Part, roles: LayerRoles | None = None) -> Iterator[None]:
        """Play a part."""
        before, (self.part, self.roles) = (self.part, self.roles), (part, roles)
        try:
            yield
        finally:
            self.part, self.roles = before
