"""Scores, budget and exact top-K: ranked by many programs of a row, chosen by its last one.

Grid (chunk, row). Every program turns its chunk of logits into ordered int32 keys, adds them to the
row's histogram of the top 11 bits, and notes that histogram of its own chunk, summed from the top
down, and a short list of the chunk's largest keys. The last program of a row to arrive then has the
mass, N_v and K, knows the bucket that holds the K-th key, lists the keys in it and above, most of
them from the short lists, finds the other 21 bits, and writes the kept positions, ascending.

All sums are of integers, so the order of arrival changes nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _host, tuning
from ._math import is_last, is_visual, locate, visible_range
from ._radix import ABSENT, BUCKETS, LOW_BITS, keep_largest, ordered_key, shorten, take_counts

# What the keys are made of, for `SOURCE`.
PROB, LOGIT, SUMS, SCORES = 0, 1, 2, 3


@triton.jit
def _scores_of(
    z_ptr, final_ptr, b, n, candidate, rows, heads, n_slots, z_slots, z_scale,
    SOURCE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Score of positions n from what was kept: the final statistics of the row, nothing else."""
    if SOURCE == 3:
        score = tl.load(z_ptr + b * n_slots + n, mask=candidate, other=0.0)
    else:
        score = tl.zeros([CHUNK], dtype=tl.float32)
        # rows of kept logits, one per head or one per KV head; eight loads of each are in flight
        for first in range(0, rows, 8):
            row = first + tl.arange(0, 8)
            real = row < rows
            row += b * rows
            # [8, CHUNK], read whole: a mask per slot would make the loads narrow
            z = tl.load(z_ptr + row[:, None] * z_slots + n[None, :], mask=real[:, None], other=0.0)
            if SOURCE == 0:
                m = tl.load(final_ptr + row * 3, mask=real, other=0.0)
                share = tl.load(final_ptr + row * 3 + 1, mask=real, other=0.0)
                z = tl.exp((z - m[:, None]) * z_scale) * share[:, None]
            score += tl.sum(z, axis=0)
        score = score / heads
    return score


@triton.jit
def _masses(final_ptr, b, heads, HEADS: tl.constexpr):
    """Largest and mean visual mass of the heads; a NaN in any makes both NaN."""
    h = tl.arange(0, HEADS)
    mass = tl.load(final_ptr + (b * heads + h) * 3 + 2, mask=h < heads, other=0.0)
    mean = tl.sum(mass) / heads
    largest = tl.max(tl.where(mass == mass, mass, 0.0))
    return tl.where(mean == mean, largest, mean), mean


@triton.jit
def _count(b, n_visual, ratio, r_min, r_max, wanted_ptr, k_max):
    """K of the row from the ratio, or from the wanted count where one is given."""
    if wanted_ptr is not None:
        k = tl.minimum(tl.maximum(tl.load(wanted_ptr + b), 0), n_visual)
    else:
        r = tl.where(ratio == ratio, tl.minimum(tl.maximum(ratio, r_min), r_max), r_max)
        k = tl.floor(r * n_visual.to(tl.float32)).to(tl.int32)
        k = tl.minimum(tl.maximum(k, 1), n_visual)
    return tl.minimum(k, k_max)


@triton.jit
def _chunks_of(begin, end, CHUNK: tl.constexpr):
    """First chunk of a row and the one past its last; a row without keys has its chunk 0."""
    some = end > begin
    first = tl.where(some, begin // CHUNK, 0)
    return first, tl.where(some, (end + CHUNK - 1) // CHUNK, 1)


@triton.jit(do_not_specialize=_host.PLAIN)
def _rank_kernel(
    z_ptr, final_ptr, scores_ptr, mass_ptr, mean_ptr, keys_ptr, short_ptr, cut_ptr,
    from_ptr, place_ptr, ids_ptr, list_ptr, candidates_ptr, histogram_ptr, arrived_ptr,
    indices_ptr, counts_ptr, ratio_ptr, wanted_ptr, table_ptr, starts_ptr, lengths_ptr, spans_ptr,
    z_scale, r_min, r_max, n_slots, n_tiles, window, n_pages, n_spans, rows, heads, k_max,
    stride_tb,
    SOURCE: tl.constexpr, SELECT: tl.constexpr, MEAN: tl.constexpr,
    PAGE: tl.constexpr, STEPS: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
    SHORT: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_keys = n_tiles * TILE
    begin, end = visible_range(starts_ptr, lengths_ptr, b, n_slots, window)
    first, last = _chunks_of(begin, end, CHUNK)
    takes_part = (chunk >= first) & (chunk < last)
    if SOURCE != 3:  # noqa: SIM102 - the first is known when compiling, the second is not
        if chunk == 0:
            largest, mean = _masses(final_ptr, b, heads, HEADS)
            tl.store(mass_ptr + b, largest)
            tl.store(mean_ptr + b, mean)
    if scores_ptr is None:  # noqa: SIM102
        if not takes_part:
            return
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    if PAGE > 0:
        table_ptr += b * stride_tb
    _, _, candidate = locate(n, (n >= begin) & (n < end), table_ptr, n_pages, PAGE)
    candidate = candidate & is_visual(n, spans_ptr + b * n_spans * 2, n_spans, STEPS)
    score = _scores_of(
        z_ptr, final_ptr, b, n, candidate, rows, heads, n_slots, n_tiles * TILE, z_scale,
        SOURCE, CHUNK,
    )  # fmt: skip
    if scores_ptr is not None:
        given = tl.where(candidate, score, float("-inf"))
        tl.store(scores_ptr + b * n_slots + n, given, mask=n < n_slots)
    if SELECT:  # noqa: SIM102
        if takes_part:
            keys_ptr += b * n_keys
            histogram_ptr += b * BUCKETS
            key = tl.where(candidate, ordered_key(score), ABSENT)
            tl.store(keys_ptr + n, key)
            bins = tl.arange(0, BUCKETS)
            counts = tl.histogram((key >> LOW_BITS) + BUCKETS // 2, BUCKETS, mask=candidate)
            tl.atomic_add(histogram_ptr + bins, counts, mask=counts > 0, sem="relaxed")
            n_chunks = tl.num_programs(0)
            from_ptr += b * n_chunks * BUCKETS
            tl.store(from_ptr + chunk * BUCKETS + bins, tl.cumsum(counts, 0, reverse=True))
            short_ptr += b * n_chunks * SHORT
            cut_ptr += b * n_chunks
            tl.debug_barrier()
            shorten(
                keys_ptr, from_ptr + chunk * BUCKETS, short_ptr + chunk * SHORT, cut_ptr + chunk,
                chunk * CHUNK, CHUNK, SHORT,
            )  # fmt: skip
            if is_last(arrived_ptr + b, last - first):
                counts = take_counts(histogram_ptr, BUCKETS)
                if ratio_ptr is not None:
                    ratio = tl.load(ratio_ptr + b)
                elif SOURCE == 3:
                    ratio = tl.load((mean_ptr if MEAN else mass_ptr) + b)
                else:
                    largest, mean = _masses(final_ptr, b, heads, HEADS)
                    ratio = mean if MEAN else largest
                k = _count(b, tl.sum(counts), ratio, r_min, r_max, wanted_ptr, k_max)
                tl.store(counts_ptr + b, k)
                ids_ptr += b * 2 * n_chunks
                keep_largest(
                    keys_ptr, short_ptr, cut_ptr, from_ptr, place_ptr + b * n_chunks,
                    ids_ptr, ids_ptr + n_chunks, list_ptr + b * n_keys,
                    candidates_ptr + b * n_keys, histogram_ptr, indices_ptr + b * k_max,
                    first, last, k, counts, k_max, CHUNK, SHORT, LINES, TILE,
                )  # fmt: skip


class Kept(NamedTuple):
    """What choosing gives: indices [B, K_max], counts [B], mass [B], mass_mean [B]."""

    indices: Tensor | None
    counts: Tensor | None
    mass: Tensor
    mass_mean: Tensor


def _launch(
    z: Tensor,
    final: Tensor | None,
    masses: tuple[Tensor, Tensor],
    visual: Any,
    params: Any,
    *,
    source: int,
    select: bool,
    scores: Tensor | None,
    shape: tuple[int, int, int, int],
    cut: tuple[Tensor | None, Tensor | None],
    page: dict[str, Any],
    workspace: Any,
) -> tuple[Tensor | None, Tensor | None]:
    rows, n_slots, kept_rows, heads = shape
    device = z.device
    row = tuning.TABLE[tuning.target_of(device)[0]]
    chunk, tile = row.rank_chunk, row.rank_tile
    n_tiles = triton.cdiv(n_slots, tile)
    n_chunks = triton.cdiv(n_slots, chunk)
    take = workspace.take
    starts, lengths = cut
    indices = counts = histogram = arrived = None
    scratch: tuple[Tensor | None, ...] = (None,) * 8
    if select:
        indices = torch.empty((rows, params.k_max), dtype=torch.int32, device=device)
        counts = torch.empty(rows, dtype=torch.int32, device=device)
        scratch = tuple(
            take(f"triton.rank.{name}", rows * numel, dtype, device)
            for name, numel, dtype in (
                ("keys", n_tiles * tile, torch.int32),
                ("short", n_chunks * row.rank_short, torch.int64), ("cut", n_chunks, torch.int32),
                ("from_bin", n_chunks * 2048, torch.int32), ("place", n_chunks, torch.int32),
                ("ids", 2 * n_chunks, torch.int32), ("list", n_tiles * tile, torch.int64),
                ("candidates", n_tiles * tile, torch.int32),
            )
        )  # fmt: skip
        histogram = workspace.zeroed("triton.rank.histogram", rows * 2048, torch.int32, device)
        arrived = workspace.zeroed("triton.rank.arrived", rows, torch.int32, device)
    n_spans = visual.spans.shape[1]
    _rank_kernel[(n_chunks, rows)](
        z, final, scores, *masses, *scratch, histogram, arrived, indices, counts,
        params.ratio, params.wanted,
        starts_ptr=starts, lengths_ptr=lengths, spans_ptr=visual.spans,
        z_scale=1.0 / params.tau if params.score == "prob_tau" else 1.0,
        r_min=float(params.r_min), r_max=float(params.r_max),
        n_slots=n_slots, n_tiles=n_tiles, window=params.window, n_spans=n_spans,
        rows=kept_rows, heads=heads, k_max=params.k_max, **page,
        SOURCE=source, SELECT=select, MEAN=params.mass_of == "mean",
        STEPS=_host.span_steps(n_spans), HEADS=triton.next_power_of_2(heads),
        CHUNK=chunk, SHORT=row.rank_short, LINES=row.rank_lines, TILE=tile,
        num_warps=row.rank_warps, **_host.register_cap(row.rank_registers if select else 0),
    )  # fmt: skip
    return indices, counts


def rank(
    z: Tensor,
    final: Tensor,
    kv: Any,
    heads: int,
    visual: Any,
    params: Any,
    *,
    sums_only: bool,
    select: bool,
    scores: Tensor | None,
    workspace: Any,
) -> Kept:
    """Turn what `scan` kept into masses, scores [B, N] if given, and with `select` a selection."""
    masses = tuple(torch.empty(kv.batch, dtype=torch.float32, device=z.device) for _ in range(2))
    source = SUMS if sums_only else LOGIT if params.score == "logit" else PROB
    indices, counts = _launch(
        z, final, masses, visual, params, source=source, select=select, scores=scores,
        shape=(kv.batch, kv.capacity, kv.kv_heads if sums_only else heads, heads),
        cut=(kv.starts, kv.lengths), page=_host.page_args(kv), workspace=workspace,
    )  # fmt: skip
    return Kept(indices, counts, *masses)


def choose(
    scores: Tensor,
    mass: Tensor,
    mass_mean: Tensor,
    visual: Any,
    params: Any,
    *,
    starts: Tensor | None,
    lengths: Tensor | None,
    workspace: Any,
) -> Kept:
    """Select from given scores [B, N] and masses [B]."""
    page = {"table_ptr": None, "stride_tb": 0, "n_pages": 0, "PAGE": 0}
    indices, counts = _launch(
        scores, None, (mass.contiguous(), mass_mean.contiguous()), visual, params,
        source=SCORES, select=True, scores=None, shape=(*scores.shape, 1, 1),
        cut=(starts, lengths), page=page, workspace=workspace,
    )  # fmt: skip
    return Kept(indices, counts, mass, mass_mean)
