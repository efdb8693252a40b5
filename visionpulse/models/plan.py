"""What each layer of a patched model does, from a config and the model's layers."""

from dataclasses import dataclass, field
from typing import Any

from .. import schedule
from ..config import PulseConfig
from ..schedule import Role
from .families import Anatomy


@dataclass(frozen=True, eq=False)
class Plan:
    """The roles of all layers under one config; made by `plan_of`, replaced by an update."""

    config: PulseConfig
    anchors: tuple[int, ...]
    fresh: tuple[Role, ...]  # on the first decode step, and on a refresh
    later: tuple[Role, ...]  # on all others; differs from `fresh` under "lookback" only
    text: tuple[Role, ...]  # where no row has a visual token
    looks_back: bool = field(default=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self  # a copied cache still knows which plan its selection came from

    def roles(self, step: int) -> tuple[Role, ...]:
        """The roles in decode step `step`."""
        if not self.looks_back:
            return self.fresh
        refresh = self.config.refresh
        return self.fresh if step == 0 or (refresh and step % refresh == 0) else self.later


def plan_of(config: PulseConfig, anatomy: Anatomy) -> Plan:
    """Decide the roles; an anchor that is not a full-attention layer is refused here."""
    if config.anchor is None and config.schedule != "per_layer" and anatomy.published is not None:
        config = config.updated(anchor=anatomy.published)
    full = anatomy.full
    anchors = schedule.anchors(config, full)

    def seen(roles: tuple[Role, ...]) -> tuple[Role, ...]:
        if anatomy.dense_because:
            return (Role.MODEL,) * len(full)
        if config.dense == "model":
            return tuple(Role.MODEL if role is Role.DENSE else role for role in roles)
        return roles

    text = tuple(Role.DENSE if is_full else Role.MODEL for is_full in full)
    return Plan(
        config,
        anchors,
        seen(schedule.roles(config, full, 0)),
        seen(schedule.roles(config, full, 1)),
        seen(text),
        config.schedule == "lookback",
    )
