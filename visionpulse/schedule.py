"""Which layer does what in a decode step: one pure function of config, layers and step."""

from collections.abc import Sequence
from enum import Enum

from .config import PulseConfig


class Role(Enum):
    """What one layer does in one decode step."""

    MODEL = "model"  # sliding, chunked or linear attention: the model's own path
    DENSE = "dense"  # attend to all keys
    ANCHOR = "anchor"  # score, select, attend
    FOLLOWER = "follower"  # attend to text and to the latest selection


def default_anchor(full: Sequence[bool]) -> int:
    """The anchor of a model that has no published one: layer 17 of 36, by proportion.

    `full` says for each layer whether it is a full-attention layer; the anchor moves to the nearest
    such layer at or after its place, else before.
    """
    wanted = len(full) * 17 // 36
    places = [layer for layer, is_full in enumerate(full) if is_full]
    if not places:
        raise ValueError("the model has no full-attention layer, so no layer can be an anchor")
    return next((layer for layer in places if layer >= wanted), places[-1])


def anchors(config: PulseConfig, full: Sequence[bool]) -> tuple[int, ...]:
    """The anchor layers of a config on a model, checked against its layers."""
    places = [layer for layer, is_full in enumerate(full) if is_full]
    if config.schedule == "per_layer":
        return tuple(places)
    if config.schedule == "dense":
        return ()
    if config.anchor is None:
        return (default_anchor(full),)
    asked = config.anchor if isinstance(config.anchor, tuple) else (config.anchor,)
    for layer in asked:
        if layer not in places:
            raise ValueError(
                f"anchor {layer} is not a full-attention layer of this model; "
                f"those are {', '.join(map(str, places)) or 'none'}"
            )
    return asked


def roles(config: PulseConfig, full: Sequence[bool], step: int) -> tuple[Role, ...]:
    """The role of every layer in decode step `step`, counted from 0 after a prefill or a crop.

    A follower attends to the latest selection: the one of the nearest anchor before it in this
    step, or, under "lookback", the one that the anchor made in the previous step.
    """
    chosen = anchors(config, full)
    refreshes = config.refresh > 0 and step % config.refresh == 0
    looks_back = config.schedule == "lookback" and step > 0 and not refreshes
    early = Role.FOLLOWER if looks_back else Role.DENSE

    def role(layer: int) -> Role:
        if not full[layer]:
            return Role.MODEL
        if not chosen:
            return Role.DENSE
        if layer in chosen:
            return Role.ANCHOR
        return early if layer < chosen[0] else Role.FOLLOWER

    return tuple(role(layer) for layer in range(len(full)))
