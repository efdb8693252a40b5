"""One patched model, as its session, its hooks and its decode steps share it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import backends
from ..layer_ops import LayerOps
from .conversation import Conversation
from .families import Anatomy
from .float8_layers import fit_layers
from .kv_layers import swap_layers
from .layer_roles import LayerRoles
from .notices import Notices
from .sliding_layers import swap_sliding
from .stats import Recorder
from .tensor_parallel import HeadGroup


@dataclass(eq=False)
class PatchedModel:
    """The model's parts, the roles of its layers, and what is counted and said about it."""

    anatomy: Anatomy
    layer_roles: LayerRoles  # replaced by an update; a step keeps those it began with
    recorder: Recorder
    heads: HeadGroup | None  # of a model whose heads are split over processes
    notices: Notices = field(default_factory=Notices)
    ops_by_shape: dict[Any, LayerOps] = field(default_factory=dict)  # each checked once
    is_paused: bool = False
    mode: Any = None  # of lossless decoding: which part a thread's forward plays
    _most_queries: dict[torch.device, int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def roles_now(self) -> LayerRoles:
        """The roles of this thread's forward: those of its draft, where a policy chose some."""
        chosen: LayerRoles | None = None if self.mode is None else self.mode.roles
        return chosen or self.layer_roles

    @property
    def is_checking(self) -> bool:
        """Whether this thread's forward checks drafted tokens, densely."""
        return self.mode is not None and self.mode.checks

    @property
    def stays_dense(self) -> bool:
        """Whether steps are dense: always in a lossless model, but in its drafts."""
        if self.mode is None:
            return False
        return not self.mode.drafts

    def has_dense_kernel(self, device: torch.device, queries: int) -> bool:
        """Whether our dense attention of so many queries reads K and V once."""
        most = self._most_queries.get(device)
        if most is None:
            name = self.layer_roles.config.backend
            most = backends.resolve(name, device, lambda backend: None, 2).max_queries
            self._most_queries[device] = most
        return queries <= most

    def swap_layers(self, cache: Any) -> None:
        """Put our layers in place of the untouched ones of a cache."""
        swap_layers(cache, len(self.anatomy.full))
        if self.mode is not None:
            swap_sliding(cache)

    @property
    def stores_8_bits(self) -> bool:
        """Whether a cache that begins now stores 8 bits."""
        return self.layer_roles.config.cache == "fp8"

    def fit_layers(self, cache: Any) -> None:
        """Let the layers of a cache store as the setting says."""
        fit_layers(cache, self.anatomy.full, self.stores_8_bits, self.recorder.clamped)

    def set_roles(self, layer_roles: LayerRoles) -> None:
        """Let the forwards that start from now on follow other roles."""
        self.layer_roles, self.ops_by_shape, self._most_queries = layer_roles, {}, {}

    def new_conversation(self) -> Conversation:
        """A conversation with a number of its own."""
        return Conversation(next(self._numbers))
