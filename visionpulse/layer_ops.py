"""The ops for layers that repeat one shape: checked once, then straight to the backend.

A model calls the same op for every layer of a step. `LayerOps` does the checks and the choice of a
backend for the first of them; the others differ in values only, so they cost no check.
"""

from typing import Any

from torch import Tensor

from . import ops
from .backends import resolve
from .backends.by_query import fitted
from .cache import KVCache
from .call import Call, Params
from .config import PulseConfig
from .queries import count
from .selection import Selection
from .visual import VisualTokens
from .workspace import Workspace


class LayerOps:
    """Dense attention, anchor and follower for one shape of heads, dtype and device."""

    def __init__(
        self,
        q: Tensor,
        kv: KVCache,
        visual: VisualTokens | None,
        config: PulseConfig,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        """Check `q`, [B, H, D] or [B, Q, H, D], against `kv` and resolve its backend."""
        ops.check(q, kv, visual)
        self.config = config
        self.numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}
        self.params = ops.numbers(q, scale, softcap, None)
        call = Call(q, kv, self.params, visual)
        queries = count(q)
        backend = resolve(config.backend, q.device, lambda b: b.refuses(call), queries)
        self.backend = fitted(backend, queries)
        self._budgets: dict[tuple[int, int], Params] = {}

    def attend(
        self,
        q: Tensor,
        kv: KVCache,
        visual: VisualTokens | None,
        selection: Selection | None,
        workspace: Workspace,
    ) -> Tensor:
        """Give `ops.attend` without its checks: shaped as q."""
        return self.backend.attend(Call(q, kv, self.params, visual, selection, workspace=workspace))

    def decode(
        self, q: Tensor, kv: KVCache, visual: VisualTokens, workspace: Workspace
    ) -> tuple[Tensor, Selection]:
        """Give `ops.decode` without its checks, where the budget is part of the op."""
        params = self._budget(q, visual)
        if params is None:
            return ops.decode(q, kv, visual, self.config, workspace=workspace, **self.numbers)
        return self.backend.decode(Call(q, kv, params, visual, workspace=workspace))

    def _budget(self, q: Tensor, visual: VisualTokens) -> Params | None:
        """The anchor's numbers; None for a policy that runs between the stages."""
        rows = q.shape[:-2].numel()
        key = (visual.max_count, rows)
        params = self._budgets.get(key)
        if params is None:
            params, between = ops.budget(self.params, self.config, visual, rows, q.device)
            if between is not None:
                return None
            if params.ratio is None:  # else it was drawn for this step alone
                self._budgets[key] = params
        return params


def cache_of(k: Tensor, v: Tensor, lengths: Tensor | None, starts: Tensor | None) -> KVCache:
    """A KVCache without its checks, for tensors shaped like ones that were checked."""
    kv: KVCache = object.__new__(KVCache)
    fields: dict[str, Any] = kv.__dict__
    fields["k"], fields["v"], fields["lengths"], fields["starts"] = k, v, lengths, starts
    return kv
