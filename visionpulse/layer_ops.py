"""The ops for layers that repeat one shape: checked once, then straight to the backend.

A model calls the same op for every layer of a step. `LayerOps` does the checks and the choice of a
backend for the first of them; the others differ in values only, so they cost no check.
"""

from functools import partial
from typing import Any

from torch import Tensor

from . import ops
from .backends import resolve
from .backends.by_query import fitted
from .cache import Cache, KVCache, PagedKVCache
from .call import Call, Params
from .config import PulseConfig
from .queries import count
from .selection import Selection
from .visual import VisualTokens
from .workspace import Workspace

_call = partial(tuple.__new__, Call)  # a Call of all its fields, without a frame to fill them in


class LayerOps:
    """Dense attention, anchor and follower for one shape of heads, dtype, device and cache."""

    def __init__(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens | None,
        config: PulseConfig,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ) -> None:
        """Check `q`, [B, H, D] or [B, Q, H, D], against `kv` and resolve its backend."""
        ops.check(q, kv, visual)
        self.config = config
        self.numbers: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
        self.params = ops.numbers(q, scale, softcap, window)
        call = Call(q, kv, self.params, visual)
        queries = count(q)
        backend = resolve(config.backend, q.device, lambda b: b.against(call), queries)
        self.backend = fitted(backend, queries)
        # of a count of rows: the count of visual tokens that K_max was made of, and all the numbers
        self._budgets: dict[tuple[int, bool], tuple[int, Params]] = {}

    def attend(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens | None,
        selection: Selection | None,
        workspace: Workspace,
        out: Tensor | None = None,
    ) -> Tensor:
        """Give `ops.attend` without its checks: shaped as q."""
        return self.backend.attend(
            _call((q, kv, self.params, visual, selection, out, None, workspace, None, None))
        )

    def decode(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens,
        workspace: Workspace,
        out: Tensor | None = None,
        selection: Selection | None = None,
        ratio: Tensor | None = None,
    ) -> tuple[Tensor, Selection]:
        """Give `ops.decode` without its checks, where the budget is part of the op.

        `ratio`, float32 [B], stands in for the mass: for a budget that the caller draws itself,
        since nothing may be drawn in a graph.
        """
        params = self._budget(q, visual, ratio)
        if params is None:
            return ops.decode(
                q, kv, visual, self.config,
                out=out, selection=selection, workspace=workspace, **self.numbers,
            )  # fmt: skip
        return self.backend.decode(
            _call((q, kv, params, visual, None, out, None, workspace, None, selection))
        )

    def _budget(self, q: Tensor, visual: VisualTokens, ratio: Tensor | None) -> Params | None:
        """The anchor's numbers; None for a policy that runs between the stages.

        What the count of rows decides is kept for good: a captured graph reads its memory. K_max
        may differ in every step.
        """
        shape, tokens = q.shape, visual.max_count
        rows = shape[0] if len(shape) == 3 else shape[0] * shape[1]
        key = rows, ratio is None
        made_of, params = self._budgets.get(key, (tokens, None))
        if params is None:
            params, between = ops.budget(self.params, self.config, visual, rows, q.device)
            if between is not None:
                return None
            if params.ratio is None or ratio is not None:  # else drawn for this step alone
                self._budgets[key] = tokens, params
        elif made_of != tokens:
            params = params._replace(k_max=ops.k_max(self.config, visual))
            self._budgets[key] = tokens, params
        return params if ratio is None else params._replace(ratio=ratio)


def cache_of(
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> KVCache:
    """A KVCache without its checks, for tensors shaped like ones that were checked."""
    kv: KVCache = object.__new__(KVCache)
    fields: dict[str, Any] = kv.__dict__
    fields["k"], fields["v"], fields["lengths"], fields["starts"] = k, v, lengths, starts
    fields["k_scale"], fields["v_scale"] = k_scale, v_scale
    return kv


def paged_cache_of(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    layout: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> PagedKVCache:
    """A PagedKVCache without its checks, for tensors shaped like ones that were checked."""
    kv: PagedKVCache = object.__new__(PagedKVCache)
    fields: dict[str, Any] = kv.__dict__
    fields["k_pages"], fields["v_pages"] = k_pages, v_pages
    fields["block_table"], fields["lengths"], fields["starts"] = block_table, lengths, None
    fields["layout"], fields["k_scale"], fields["v_scale"] = layout, k_scale, v_scale
    return kv
