"""The ops of `LayerOps` for a step that is being compiled: the checked ops, which a graph takes."""

from typing import Any

from torch import Tensor

from .. import ops
from ..cache import KVCache
from ..config import PulseConfig
from ..selection import Selection
from ..visual import VisualTokens


class TracedOps:
    """Dense attention, anchor and follower; a graph brings memory of its own, so no workspace."""

    def __init__(self, config: PulseConfig, scale: float | None, softcap: float | None) -> None:
        self.config = config
        self.numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}

    def attend(
        self,
        q: Tensor,
        kv: KVCache,
        visual: VisualTokens | None,
        selection: Selection | None,
        workspace: None,
    ) -> Tensor:
        """Attend densely, or to text and a selection: [B, H, D]."""
        backend = self.config.backend
        if selection is None:
            return ops.attend(q, kv, backend=backend, **self.numbers)
        return ops.attend(q, kv, visual, selection, backend=backend, **self.numbers)

    def decode(
        self, q: Tensor, kv: KVCache, visual: VisualTokens, workspace: None
    ) -> tuple[Tensor, Selection]:
        """Score, select and attend."""
        return ops.decode(q, kv, visual, self.config, **self.numbers)
