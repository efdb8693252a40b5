"""Scores, budget and exact top-K: scored by many programs of a row, selected by its last one.

Grid (chunk, row). Every program turns the stored logits of its chunk into scores and sort codes,
and prepares the selection: it adds to the row's histogram of the top 11 bits, and stores the counts
of its own chunk and a list of the chunk's largest codes. The last program of a row to arrive knows
the mass, N_v and K, and selects (`_radix.py`).

All sums are of integers, so the order of arrival changes nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _host, tuning
from ._math import is_last, is_visual, locate, range_of_row
from ._radix import ABSENT, BUCKETS, LOW_BITS, list_top, select_largest, sort_code, take_counts


@triton.jit
def _scores_of(
    logits_ptr, head_stats_ptr, b, n, candidate, n_stored, n_heads, n_slots, padded_slots, inv_tau,
    FROM_SCORES: tl.constexpr, PROB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores of positions n from the stored logits and the heads' statistics, or as they came."""
    if FROM_SCORES:
        score = tl.load(logits_ptr + b * n_slots + n, mask=candidate, other=0.0)
    else:
        score = tl.zeros([CHUNK], dtype=tl.float32)
        # stored per query head or per KV head; eight loads of each thread are in flight
        for first in range(0, n_stored, 8):
            head = first + tl.arange(0, 8)
            is_head = head < n_stored
            head += b * n_stored
            # [8, CHUNK], read whole: a mask per slot would make the loads narrow
            z = tl.load(
                logits_ptr + head[:, None] * padded_slots + n[None, :],
                mask=is_head[:, None], other=0.0,
            )  # fmt: skip
            if PROB:
                m = tl.load(head_stats_ptr + head * 3, mask=is_head, other=0.0)
                inv_sum = tl.load(head_stats_ptr + head * 3 + 1, mask=is_head, other=0.0)
                z = tl.exp((z - m[:, None]) * inv_tau) * inv_sum[:, None]
            score += tl.sum(z, axis=0)
        score = score / n_heads
    return score


@triton.jit
def _masses(head_stats_ptr, b, n_heads, BLOCK_H: tl.constexpr):
    """Largest and mean mass of the heads; a NaN in any makes both NaN."""
    h = tl.arange(0, BLOCK_H)
    mass = tl.load(head_stats_ptr + (b * n_heads + h) * 3 + 2, mask=h < n_heads, other=0.0)
    mean = tl.sum(mass) / n_heads
    largest = tl.max(tl.where(mass == mass, mass, 0.0))
    return tl.where(mean == mean, largest, mean), mean


@triton.jit
def _count(b, n_visual, ratio, r_min, r_max, wanted_ptr, k_max):
    """K of the row, from the ratio or from the caller's own wanted count."""
    if wanted_ptr is not None:
        k = tl.minimum(tl.maximum(tl.load(wanted_ptr + b), 0), n_visual)
    else:
        r = tl.where(ratio == ratio, tl.minimum(tl.maximum(ratio, r_min), r_max), r_max)
        k = tl.floor(r * n_visual.to(tl.float32)).to(tl.int32)
        k = tl.minimum(tl.maximum(k, 1), n_visual)
    return tl.minimum(k, k_max)


@triton.jit
def _chunks_of(begin, end, CHUNK: tl.constexpr):
    """First chunk of a row and the one past its last; a row without visible keys has chunk 0."""
    any_key = end > begin
    first = tl.where(any_key, begin // CHUNK, 0)
    return first, tl.where(any_key, (end + CHUNK - 1) // CHUNK, 1)


@triton.jit(do_not_specialize=_host.PLAIN)
def _select_kernel(
    logits_ptr, head_stats_ptr, scores_ptr, mass_ptr, mean_ptr, codes_ptr, top_ptr, top_bin_ptr,
    counts_from_ptr, offset_ptr, chunks_ptr, list_ptr, low_ptr, histogram_ptr, arrived_ptr,
    indices_ptr, counts_ptr, ratio_ptr, wanted_ptr, table_ptr, starts_ptr, lengths_ptr,
    q_counts_ptr, spans_ptr, inv_tau, r_min, r_max, n_slots, n_tiles, window, n_pages, n_spans,
    n_stored, n_heads, k_max, n_queries, stride_tb,
    SEVERAL: tl.constexpr, FROM_SCORES: tl.constexpr, PROB: tl.constexpr, SELECT: tl.constexpr,
    MEAN: tl.constexpr, PAGE: tl.constexpr, STEPS: tl.constexpr, BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr, TOP: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)  # each query is a row
    padded_slots = n_tiles * TILE
    in_cache, _, begin, end = range_of_row(
        b, starts_ptr, lengths_ptr, q_counts_ptr, n_slots, window, n_queries, SEVERAL
    )
    first, last = _chunks_of(begin, end, CHUNK)
    takes_part = (chunk >= first) & (chunk < last)
    if not FROM_SCORES:  # noqa: SIM102 - known when compiled, the other at run time; so below
        if chunk == 0:
            largest, mean = _masses(head_stats_ptr, b, n_heads, BLOCK_H)
            tl.store(mass_ptr + b, largest)
            tl.store(mean_ptr + b, mean)
    if scores_ptr is None:  # noqa: SIM102
        if not takes_part:
            return
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    if PAGE > 0:
        table_ptr += in_cache * stride_tb
    _, _, candidate = locate(n, (n >= begin) & (n < end), table_ptr, n_pages, PAGE)
    candidate = candidate & is_visual(n, spans_ptr + in_cache * n_spans * 2, n_spans, STEPS)
    score = _scores_of(
        logits_ptr, head_stats_ptr, b, n, candidate, n_stored, n_heads, n_slots, n_tiles * TILE,
        inv_tau, FROM_SCORES, PROB, CHUNK,
    )  # fmt: skip
    if scores_ptr is not None:
        masked = tl.where(candidate, score, float("-inf"))
        tl.store(scores_ptr + b * n_slots + n, masked, mask=n < n_slots)
    if SELECT:  # noqa: SIM102
        if takes_part:
            codes_ptr += b * padded_slots
            histogram_ptr += b * BUCKETS
            code = tl.where(candidate, sort_code(score), ABSENT)
            tl.store(codes_ptr + n, code)
            bins = tl.arange(0, BUCKETS)
            counts = tl.histogram((code >> LOW_BITS) + BUCKETS // 2, BUCKETS, mask=candidate)
            tl.atomic_add(histogram_ptr + bins, counts, mask=counts > 0, sem="relaxed")
            n_chunks = tl.num_programs(0)
            counts_from_ptr += b * n_chunks * BUCKETS
            tl.store(counts_from_ptr + chunk * BUCKETS + bins, tl.cumsum(counts, 0, reverse=True))
            top_ptr += b * n_chunks * TOP
            top_bin_ptr += b * n_chunks
            tl.debug_barrier()
            list_top(
                codes_ptr, counts_from_ptr + chunk * BUCKETS, top_ptr + chunk * TOP,
                top_bin_ptr + chunk, chunk * CHUNK, CHUNK, TOP,
            )  # fmt: skip
            if is_last(arrived_ptr + b, last - first):
                counts = take_counts(histogram_ptr, BUCKETS)
                if ratio_ptr is not None:
                    ratio = tl.load(ratio_ptr + b)
                elif FROM_SCORES:
                    ratio = tl.load((mean_ptr if MEAN else mass_ptr) + b)
                else:
                    largest, mean = _masses(head_stats_ptr, b, n_heads, BLOCK_H)
                    ratio = mean if MEAN else largest
                k = _count(b, tl.sum(counts), ratio, r_min, r_max, wanted_ptr, k_max)
                tl.store(counts_ptr + b, k)
                chunks_ptr += b * 2 * n_chunks
                select_largest(
                    codes_ptr, top_ptr, top_bin_ptr, counts_from_ptr, offset_ptr + b * n_chunks,
                    chunks_ptr, chunks_ptr + n_chunks, list_ptr + b * padded_slots,
                    low_ptr + b * padded_slots, histogram_ptr, indices_ptr + b * k_max,
                    first, last, k, counts, k_max, CHUNK, TOP, LINES, TILE,
                )  # fmt: skip


# What the kernel takes in their place where it only scores.
_NO_SELECTION = dict.fromkeys(
    (
        "codes_ptr", "top_ptr", "top_bin_ptr", "counts_from_ptr", "offset_ptr", "chunks_ptr",
        "list_ptr", "low_ptr", "histogram_ptr", "arrived_ptr", "indices_ptr", "counts_ptr",
    )
)  # fmt: skip


def _selection_args(
    workspace: Any, selection: Any, n_slots: int, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of a selection, and the scratch memory that it is made in."""
    rows = len(selection.counts)
    table = tuning.table_of(device)
    n_chunks = triton.cdiv(n_slots, table.select_chunk)
    padded = _host.padded_slots(n_slots, device)
    scratch = (
        ("codes", padded, torch.int32),
        ("top", n_chunks * table.select_top, torch.int64), ("top_bin", n_chunks, torch.int32),
        ("counts_from", n_chunks * BUCKETS.value, torch.int32), ("offset", n_chunks, torch.int32),
        ("chunks", 2 * n_chunks, torch.int32),
        ("list", padded, torch.int64), ("low", padded, torch.int32),
    )  # fmt: skip
    counters = (("histogram", BUCKETS.value), ("arrived", 1))
    return {
        **{
            f"{name}_ptr": workspace.take(f"triton.select.{name}", rows * numel, dtype, device)
            for name, numel, dtype in scratch
        },
        **{
            f"{name}_ptr": workspace.zeroed(
                f"triton.select.{name}", rows * numel, torch.int32, device
            )
            for name, numel in counters
        },
        "indices_ptr": selection.indices,
        "counts_ptr": selection.counts,
    }


def _launch(
    logits: Tensor,
    masses: tuple[Tensor, Tensor],
    visual: Any,
    params: Any,
    *,
    selection: dict[str, Tensor] | None,
    scores: Tensor | None,
    visible: dict[str, Any],
    pages: dict[str, Any],
    queries: int = 1,
    q_counts: Tensor | None = None,
    from_scores: bool = False,
    head_stats: Tensor | None = None,
    n_stored: int = 1,
    n_heads: int = 1,
) -> None:
    table = tuning.table_of(logits.device)
    rows, n_slots = len(masses[0]), visible["n_slots"]
    _select_kernel[(triton.cdiv(n_slots, table.select_chunk), rows)](
        logits_ptr=logits, head_stats_ptr=head_stats, n_stored=n_stored, n_heads=n_heads,
        BLOCK_H=triton.next_power_of_2(n_heads),
        FROM_SCORES=from_scores, PROB=not from_scores and params.score != "logit",
        inv_tau=1.0 / params.tau if params.score == "prob_tau" else 1.0,
        scores_ptr=scores, mass_ptr=masses[0], mean_ptr=masses[1],
        **visible, **pages, **_host.span_args(visual), **_host.several_args(queries, q_counts),
        **_host.padded_args(n_slots, logits.device),
        SELECT=selection is not None, **(selection or _NO_SELECTION),
        ratio_ptr=params.ratio, wanted_ptr=params.wanted, MEAN=params.mass_of == "mean",
        r_min=float(params.r_min), r_max=float(params.r_max), k_max=params.k_max,
        CHUNK=table.select_chunk, TOP=table.select_top, LINES=table.select_lines,
        num_warps=table.select_warps,
        **_host.register_cap(table.select_registers if selection else 0),
    )  # fmt: skip


def _from_logits(
    stored_logits: Tensor,
    head_stats: Tensor,
    kv: Any,
    n_heads: int,
    visual: Any,
    params: Any,
    *,
    sums_only: bool,
    selection: dict[str, Tensor] | None,
    scores: Tensor | None,
    masses: tuple[Tensor, Tensor],
    queries: int,
    q_counts: Tensor | None,
) -> None:
    _launch(
        stored_logits, masses, visual, params, selection=selection, scores=scores,
        visible=_host.visible_args(kv.starts, kv.lengths, kv.capacity, params.window),
        pages=_host.page_args(kv), head_stats=head_stats,
        n_stored=kv.kv_heads if sums_only else n_heads, n_heads=n_heads,
        queries=queries, q_counts=q_counts,
    )  # fmt: skip


def finish_scores(
    stored_logits: Tensor,
    head_stats: Tensor,
    kv: Any,
    n_heads: int,
    visual: Any,
    params: Any,
    *,
    sums_only: bool,
    scores: Tensor,
    masses: tuple[Tensor, Tensor],
    queries: int = 1,
    q_counts: Tensor | None = None,
) -> None:
    """Fill `scores` [B, N], the largest mass and the mean one [B] from what `score` stored.

    Each query is a row here: B * Q.
    """
    _from_logits(
        stored_logits, head_stats, kv, n_heads, visual, params,
        sums_only=sums_only, selection=None, scores=scores, masses=masses, queries=queries,
        q_counts=q_counts,
    )  # fmt: skip


def select_by_logits(
    stored_logits: Tensor,
    head_stats: Tensor,
    kv: Any,
    n_heads: int,
    visual: Any,
    params: Any,
    selection: Any,
    *,
    sums_only: bool,
    scores: Tensor | None,
    workspace: Any,
    queries: int = 1,
    q_counts: Tensor | None = None,
) -> None:
    """Fill a selection from what `score` stored, and `scores` [B, N], unless it is None."""
    _from_logits(
        stored_logits, head_stats, kv, n_heads, visual, params,
        sums_only=sums_only, scores=scores, masses=(selection.mass, selection.mass_mean),
        selection=_selection_args(workspace, selection, kv.capacity, stored_logits.device),
        queries=queries, q_counts=q_counts,
    )  # fmt: skip


def select(
    scores: Tensor,
    selection: Any,
    visual: Any,
    params: Any,
    *,
    starts: Tensor | None,
    lengths: Tensor | None,
    workspace: Any,
    q_counts: Tensor | None = None,
) -> None:
    """Fill a selection from scores [B, N] and from the masses that it holds already.

    Of several queries B is B * Q.
    """
    n_slots = scores.shape[1]
    _launch(
        scores, (selection.mass, selection.mass_mean), visual, params,
        selection=_selection_args(workspace, selection, n_slots, scores.device),
        scores=None, from_scores=True,
        queries=len(scores) // visual.spans.shape[0], q_counts=q_counts,
        visible=_host.visible_args(starts, lengths, n_slots, params.window),
        pages=_host.NO_PAGES,
    )  # fmt: skip
