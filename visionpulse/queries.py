"""Several queries of one row, each as a row of its own: by this they are defined.

Query i of Q has its own key at `length - Q + i`; as a row it has the length `length - Q + 1 + i`. A
query that is not real sees no key. K and V are not copied: the block table is repeated.
"""

import dataclasses

import torch
from torch import Tensor

from .cache import Cache, KVCache, PagedKVCache
from .call import Call, Scored
from .visual import VisualTokens


def count(q: Tensor) -> int | None:
    """Q of a query [B, Q, H, D]; None for one of [B, H, D]."""
    return q.shape[1] if q.dim() == 4 else None


def lengths_of(
    lengths: Tensor | None,
    q_counts: Tensor | None,
    rows: int,
    queries: int,
    size: int,
    device: torch.device,
) -> Tensor:
    """The length of each query as a row: int32 [B * Q], 0 for one that is not real."""
    number = torch.arange(queries, dtype=torch.int32, device=device)
    if lengths is None:
        ends = (number + (size - queries + 1)).expand(rows, -1)
    else:
        ends = lengths.clamp(max=size)[:, None] + (number - (queries - 1))
    if q_counts is not None:
        ends = torch.where(number >= queries - q_counts[:, None], ends, 0)
    return ends.clamp(min=0).flatten()


def call_as_rows(call: Call) -> Call:
    """A call of queries [B, Q, H, D] as one of B * Q rows; `out` only where no copy is needed."""
    queries, out = call.q.shape[1], call.out
    visual = None if call.visual is None else _visual_rows(call.visual, queries)
    if out is not None:
        out = out.flatten(0, 1) if _is_flat(out) else None
    return call._replace(
        q=call.q.flatten(0, 1), kv=_cache_rows(call.kv, queries, call.q_counts), visual=visual,
        out=out, q_counts=None,
    )  # fmt: skip


def scored_as_rows(scored: Scored) -> Scored:
    """What select takes, the cuts and the visual set by query too; as it is where they are."""
    rows, size = scored.scores.shape
    queries = rows // scored.visual.batch
    if queries == 1 and scored.q_counts is None:
        return scored
    starts = None if scored.starts is None else scored.starts.repeat_interleave(queries)
    return scored._replace(
        visual=_visual_rows(scored.visual, queries), starts=starts, q_counts=None,
        lengths=lengths_of(
            scored.lengths, scored.q_counts, scored.visual.batch, queries, size,
            scored.scores.device,
        ),
    )  # fmt: skip


def _visual_rows(visual: VisualTokens, queries: int) -> VisualTokens:
    if queries == 1:
        return visual
    return visual.rows(torch.arange(visual.batch, device=visual.device).repeat_interleave(queries))


def _cache_rows(kv: Cache, queries: int, q_counts: Tensor | None) -> Cache:
    if queries == 1 and q_counts is None:
        return kv
    lengths = lengths_of(kv.lengths, q_counts, kv.batch, queries, kv.capacity, kv.device)
    starts = None if kv.starts is None else kv.starts.repeat_interleave(queries)
    if queries == 1:
        return dataclasses.replace(kv, lengths=lengths)
    if isinstance(kv, PagedKVCache):
        table = kv.block_table.repeat_interleave(queries, 0)
        return dataclasses.replace(kv, block_table=table, lengths=lengths, starts=starts)
    return _one_page_a_row(kv, queries, lengths, starts)


def _one_page_a_row(
    kv: KVCache, queries: int, lengths: Tensor, starts: Tensor | None
) -> PagedKVCache:
    """A contiguous cache as one page of N slots for each row."""
    table = torch.arange(kv.batch, dtype=torch.int32, device=kv.device).repeat_interleave(queries)
    return PagedKVCache(kv.k, kv.v, table[:, None], lengths, starts, "HND", kv.k_scale, kv.v_scale)


def _is_flat(out: Tensor) -> bool:
    """Whether [B, Q, H, D] is [B * Q, H, D] without a copy."""
    return 1 in out.shape[:2] or out.stride(0) == out.shape[1] * out.stride(1)
