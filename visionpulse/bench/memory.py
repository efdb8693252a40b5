"""What a request takes of the memory: bytes that its cache holds, bytes that a step moves of it."""

from collections.abc import Sequence
from typing import NamedTuple

from ..config import PulseConfig
from .cost import OpShape, attention, role_counts


class Memory(NamedTuple):
    """Bytes of the layers of full attention, whose cache grows with the context."""

    held: int  # keys and values of all tokens and rows, with their scales
    moved: dict[str, int]  # by schedule: what attention reads and writes in a step

    @property
    def moves(self) -> str:
        """What a step moves, in words."""
        return ", ".join(f"{gib(moved)} {name}" for name, moved in self.moved.items())

    def __str__(self) -> str:
        return f"{gib(self.held)}; a step moves {self.moves}"


def memory(
    layer: OpShape, full: Sequence[bool], config: PulseConfig, retention: float | None = None
) -> Memory:
    """Memory of rows like those of `layer`: dense, under `paper` and `lookback`, and `config`.

    `retention` is the share of visual tokens kept, by default the largest the config allows.
    """
    share = config.ratio[1] if retention is None else retention
    kept = min(layer.visual, max(1, int(share * layer.visual)))
    settings = schedules(config) | {config.schedule: config}
    moved = {
        name: attention(role_counts(one, full), layer, kept, one.anchor_output).bytes
        for name, one in settings.items()
    }
    return Memory(sum(full) * layer.cache_bytes, moved)


def schedules(config: PulseConfig) -> dict[str, PulseConfig]:
    """The same setting, dense and under two schedules; `lookback` takes its first anchor."""
    anchor = config.anchor[0] if isinstance(config.anchor, tuple) else config.anchor
    common = config.updated(schedule="paper", dense="ours", queries="dense")
    return {
        "dense": common.updated(schedule="dense", anchor=None),
        "paper": common,
        "lookback": common.updated(schedule="lookback", anchor=anchor),
    }


def gib(bytes_: int) -> str:
    """Bytes in GiB or MiB, three digits."""
    size, unit = (bytes_ / 2**30, "GiB") if bytes_ >= 2**30 else (bytes_ / 2**20, "MiB")
    return f"{size:#.3g}".rstrip(".") + f" {unit}"
