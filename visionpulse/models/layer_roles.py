"""What each layer of a patched model does, from a config and the model's layers."""

from dataclasses import dataclass
from typing import Any

from .. import schedule
from ..config import PulseConfig
from ..schedule import Role
from .families import Anatomy, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class LayerRoles:
    """The roles of all layers under one config; an update of the session makes new ones."""

    config: PulseConfig
    anchors: tuple[int, ...]
    on_refresh: tuple[Role, ...]  # in the first decode step, and in a refresh
    on_lookback: tuple[Role, ...]  # in the others; differs from a refresh under "lookback" only
    on_text: tuple[Role, ...]  # where no row has a visual token
    on_queries: tuple[Role, ...]  # of several tokens; ours would read K again for each
    looks_back: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerRoles":
        return self  # a copied cache still knows under which roles its selection was made

    def at(self, step: int) -> tuple[Role, ...]:
        """The roles in decode step `step`."""
        refresh = self.config.refresh
        if not self.looks_back or step == 0 or (refresh and step % refresh == 0):
            return self.on_refresh
        return self.on_lookback

    @classmethod
    def of(cls, config: PulseConfig, anatomy: Anatomy) -> "LayerRoles":
        """Decide the roles; refuses an anchor that is not a full-attention layer."""
        no_anchor = config.anchor is None and config.schedule not in ("per_layer", "dense")
        if no_anchor and anatomy.published is not None:
            config = config.updated(anchor=anatomy.published)
        full = anatomy.full
        if config.cache == "fp8":
            _refuse_8_bits(anatomy)

        def allowed(roles: tuple[Role, ...]) -> tuple[Role, ...]:
            if anatomy.dense_because:
                return (Role.MODEL,) * len(full)
            if config.dense == "model":
                return tuple(Role.MODEL if role is Role.DENSE else role for role in roles)
            return roles

        on_refresh = allowed(schedule.roles(config, full, 0))
        return cls(
            config,
            anchors=schedule.anchors(config, full),
            on_refresh=on_refresh,
            on_lookback=allowed(schedule.roles(config, full, 1)),
            on_text=allowed(tuple(Role.DENSE if is_full else Role.MODEL for is_full in full)),
            on_queries=tuple(Role.MODEL if r is Role.DENSE else r for r in on_refresh),
            looks_back=config.schedule == "lookback",
        )


def _refuse_8_bits(anatomy: Anatomy) -> None:
    """Refuse a model whose layers would have to copy an 8-bit cache in every step."""
    if anatomy.dense_because:
        reason = anatomy.dense_because
    elif getattr(anatomy.config, "num_kv_shared_layers", 0):
        reason = "its last layers read the keys and values of others past the cache"
    else:
        return
    raise UnsupportedModelError(
        f"{type(anatomy.model).__name__} cannot store its cache in 8 bits: {reason}. "
        "Without cache='fp8' it can be patched"
    )
