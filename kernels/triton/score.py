"""One pass over the keys of a row: logits, softmax sums, and the dense output if asked for.

Grid (split, KV head, row). A split stores its maximum, its sums at temperature 1 and tau, and its
weighted values; the last split of a KV head to arrive merges them in split order. That saves a
second launch, and the bits do not depend on which split arrives last.

Several queries of a row are more rows of the same dot, up to 64 in one pass over the keys, each
with its own visible range. More of them take several passes, which stand in the grid as rows do.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _host, tuning
from ._float8 import lift_of, load_columns, load_query, scale_of, weights_of
from ._math import (
    block_max,
    finish_logits,
    is_last,
    is_visual,
    locate,
    merge_sums,
    merge_values,
    shift,
    split_of,
    store_out,
    visible_range,
    visible_to,
)

# Positions looked up at a time.
_WIDE: tl.constexpr = tl.constexpr(256)


@triton.jit
def _at(query, head, stride_query, stride_head):
    """Where the heads of queries lie in their row of the batch."""
    return query * stride_query + head * stride_head


@triton.jit
def _stored_row(
    pair, b, query, head, offs_h, n_queries, GROUP: tl.constexpr, SEVERAL: tl.constexpr
):  # fmt: skip
    """The row of stored logits and statistics, [B * Q, H] in order."""
    if SEVERAL:
        return (b * n_queries + query) * (tl.num_programs(1) * GROUP) + head
    else:
        return pair * GROUP + offs_h


@triton.jit(do_not_specialize=_host.PLAIN)
def _score_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, logits_ptr, head_stats_ptr, split_stats_ptr, split_values_ptr,
    arrived_ptr, table_ptr, starts_ptr, lengths_ptr, q_counts_ptr, spans_ptr, visual_ptr,
    scale, softcap, inv_tau, n_slots, n_tiles, window, n_pages, n_spans, n_queries, pass_queries,
    stride_qb, stride_qq, stride_qh, stride_ob, stride_oq, stride_oh, stride_tb,
    stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn, k_scale_ptr, v_scale_ptr,
    stride_ks, stride_vs, FLOAT8: tl.constexpr,
    SEVERAL: tl.constexpr, STORE_HEADS: tl.constexpr, STORE_SUMS: tl.constexpr,
    MASS: tl.constexpr, OUT: tl.constexpr, SCORE_AT_TAU: tl.constexpr,
    SOFTCAP: tl.constexpr, PAGE: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    split, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pair = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + g  # of row, or pass, and KV head
    offs_h = tl.arange(0, BLOCK_H)
    if SEVERAL:
        passes = (n_queries + pass_queries - 1) // pass_queries
        b = (tl.program_id(2) // passes).to(tl.int64)
        first = tl.program_id(2) % passes * pass_queries
        stop = tl.minimum(first + pass_queries, n_queries)
        query = first + offs_h // GROUP
        is_head = query < stop
        head = g * GROUP + offs_h % GROUP
        own_begin, own_end = visible_to(
            query, starts_ptr, lengths_ptr, q_counts_ptr, b, n_slots, window, n_queries
        )
        # the last query sees the last key, the first real one the first
        _, end = visible_to(
            stop - 1, starts_ptr, lengths_ptr, q_counts_ptr, b, n_slots, window, n_queries
        )
        if q_counts_ptr is not None:
            first = tl.maximum(first, n_queries - tl.load(q_counts_ptr + b))
        begin, _ = visible_to(
            first, starts_ptr, lengths_ptr, q_counts_ptr, b, n_slots, window, n_queries
        )
        begin = tl.minimum(begin, end)
    else:
        b = tl.program_id(2).to(tl.int64)
        query = 0
        is_head = offs_h < GROUP
        head = g * GROUP + offs_h
        begin, end = visible_range(starts_ptr, lengths_ptr, b, n_slots, window)
    per_split, n_splits = split_of(end - begin, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    # the grid is sized by capacity, a row by its own length
    if split >= n_splits:
        return
    begin += split * per_split
    end = tl.minimum(begin + per_split, end)

    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q_at = b * stride_qb + _at(query, head, stride_qq, stride_qh)
    if FLOAT8:
        q_even, q_odd, unit = load_query(q_ptr, q_at, is_head, D, BLOCK_D)
        logit_scale = (scale * scale_of(k_scale_ptr, g, stride_ks) * unit)[:, None]
        acc_even = tl.zeros([BLOCK_H, BLOCK_D // 2], dtype=tl.float32)
        acc_odd = acc_even
    else:
        # [BLOCK_H, BLOCK_D]
        q = tl.load(
            q_ptr + q_at[:, None] + offs_d[None, :],
            mask=is_head[:, None] & mask_d[None, :], other=0.0,
        )  # fmt: skip
        logit_scale = scale
    stride_kb, stride_vb = stride_kb.to(tl.int64) * UNIT, stride_vb.to(tl.int64) * UNIT
    stride_kn, stride_vn = stride_kn.to(tl.int64) * UNIT, stride_vn.to(tl.int64) * UNIT
    k_ptr += g * stride_kg.to(tl.int64) * UNIT
    if OUT:
        v_ptr += g * stride_vg.to(tl.int64) * UNIT
    outer = b
    if PAGE > 0:
        # the outer axis of a paged cache is the page
        outer = b * 0
        table_ptr += b * stride_tb
    if MASS:
        # searched once, ahead of the loop over keys: there every thread of a key would repeat it
        visual_ptr += pair * n_slots
        for n0 in range(begin, end, _WIDE):
            n = n0 + tl.arange(0, _WIDE)
            visual = is_visual(n, spans_ptr + b * n_spans * 2, n_spans, STEPS)
            tl.store(visual_ptr + n, visual.to(tl.int8), mask=n < end)
        tl.debug_barrier()

    m = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    total_tau = tl.zeros([BLOCK_H], dtype=tl.float32)
    visual_tau = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    for n0 in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = n0 + offs_n
        inside = n < end
        page, slot, valid = locate(n, inside, table_ptr, n_pages, PAGE)
        page += outer
        tile = valid[:, None] & mask_d[None, :]
        k_at = page * stride_kb + slot * stride_kn
        if FLOAT8:
            even, odd = load_columns(k_ptr, k_at, valid, dtype, D, BLOCK_D, FLOAT8)
            z = tl.dot(q_even, tl.trans(even), input_precision="ieee")
            z = tl.dot(q_odd, tl.trans(odd), z, input_precision="ieee")
        else:
            # [BLOCK_N, BLOCK_D]
            k = tl.load(k_ptr + k_at[:, None] + offs_d[None, :], mask=tile, other=0.0)
            # [BLOCK_H, BLOCK_N]
            z = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = valid[None, :]
        if SEVERAL:
            seen &= (n[None, :] >= own_begin[:, None]) & (n[None, :] < own_end[:, None])
        z = finish_logits(z, seen, logit_scale, softcap, SOFTCAP)
        if STORE_HEADS:
            stored_row = _stored_row(pair, b, query, head, offs_h, n_queries, GROUP, SEVERAL)
            at = stored_row[:, None] * (n_tiles * TILE) + n[None, :]
            tl.store(logits_ptr + at, z, mask=is_head[:, None] & inside[None, :])
        if STORE_SUMS:
            z_sum = tl.sum(tl.where(is_head[:, None], z, 0.0), axis=0)
            tl.store(logits_ptr + pair * (n_tiles * TILE) + n, z_sum, mask=inside)
        m_new = block_max(m, z)
        away = z - shift(m_new)[:, None]
        moved = m - shift(m_new)
        p = tl.exp(away)
        total = total * tl.exp(moved) + tl.sum(p, axis=1)
        if MASS:
            p_tau = tl.exp(away * inv_tau)
            rescale_tau = tl.exp(moved * inv_tau)
            visual = tl.load(visual_ptr + n, mask=inside, other=0) != 0
            total_tau = total_tau * rescale_tau + tl.sum(p_tau, axis=1)
            # the same order of addition, so a row of visual tokens alone has mass 1 exactly
            p_visual = tl.where(visual[None, :], p_tau, 0.0)
            visual_tau = visual_tau * rescale_tau + tl.sum(p_visual, axis=1)
        if OUT:
            v_at = page * stride_vb + slot * stride_vn
            rescale = tl.exp(moved)[:, None]
            if FLOAT8:
                even, odd = load_columns(v_ptr, v_at, valid, dtype, D, BLOCK_D, FLOAT8)
                p = weights_of(p, dtype)
                acc_even = tl.dot(p, even, acc_even * rescale, input_precision="ieee")
                acc_odd = tl.dot(p, odd, acc_odd * rescale, input_precision="ieee")
            else:
                v = tl.load(v_ptr + v_at[:, None] + offs_d[None, :], mask=tile, other=0.0)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale, input_precision="ieee")
        m = m_new

    slots = tl.num_programs(0)
    STRIDE: tl.constexpr = 4 * BLOCK_H
    split_stats_ptr += pair * slots * STRIDE
    at = split_stats_ptr + split * STRIDE + offs_h
    tl.store(at, m)
    tl.store(at + BLOCK_H, total)
    if MASS:
        tl.store(at + 2 * BLOCK_H, total_tau)
        tl.store(at + 3 * BLOCK_H, visual_tau)
    if OUT:
        if FLOAT8:
            acc = tl.interleave(acc_even, acc_odd)
        split_values_ptr += pair * slots * (BLOCK_H * BLOCK_D)
        at = (split * BLOCK_H + offs_h[:, None]) * BLOCK_D + offs_d[None, :]
        tl.store(split_values_ptr + at, acc, mask=is_head[:, None])
    if is_last(arrived_ptr + pair, n_splits):
        m, total, total_tau, mass = merge_sums(
            split_stats_ptr, n_splits, inv_tau, STRIDE, BLOCK_H, SPLITS, MASS
        )
        if MASS:
            score_sum = total_tau if SCORE_AT_TAU else total
            stored_row = _stored_row(pair, b, query, head, offs_h, n_queries, GROUP, SEVERAL)
            to = head_stats_ptr + stored_row * 3
            tl.store(to, shift(m), mask=is_head)
            tl.store(to + 1, tl.where(score_sum == 0, 0.0, 1.0 / score_sum), mask=is_head)
            tl.store(to + 2, mass, mask=is_head)
        if OUT:
            acc = merge_values(
                split_stats_ptr, split_values_ptr, m, n_splits, STRIDE, is_head, BLOCK_H, BLOCK_D
            )
            if FLOAT8:
                acc *= scale_of(v_scale_ptr, g, stride_vs) / lift_of(dtype)
            out_ptr += b * stride_ob
            store_out(
                out_ptr, _at(query, head, stride_oq, stride_oh), acc, total, is_head, D, BLOCK_D
            )


def _launch(
    q: Tensor,
    kv: Any,
    visual: Any,
    params: Any,
    *,
    stored_logits: Tensor | None,
    sums_only: bool,
    head_stats: Tensor | None,
    out: Tensor | None,
    workspace: Any,
    q_counts: Tensor | None,
) -> None:
    queries = _host.queries_of(q)
    of_pass = tuning.queries_of_pass(queries, q.shape[-2] // kv.kv_heads, q.shape[-1])
    plan = _host.plan_of(q, kv, gather=False, queries=of_pass)
    splits = _host.splits_of(plan, kv.capacity)
    passes = kv.batch * triton.cdiv(queries, of_pass)
    pairs = passes * kv.kv_heads
    is_visual_key = None
    if visual is not None:
        is_visual_key = workspace.take(
            "triton.score.visual", pairs * kv.capacity, torch.int8, q.device
        )
    _score_kernel[(splits, kv.kv_heads, passes)](
        **_host.query_args(q, out),
        **_host.several_args(queries, q_counts), pass_queries=of_pass,
        **_host.cache_args(kv),
        **_host.visible_args(kv.starts, kv.lengths, kv.capacity, params.window),
        **_host.span_args(visual), visual_ptr=is_visual_key,
        **_host.logit_args(params), inv_tau=1.0 / params.tau,
        SCORE_AT_TAU=params.score == "prob_tau", MASS=visual is not None, OUT=out is not None,
        logits_ptr=stored_logits, head_stats_ptr=head_stats,
        STORE_HEADS=stored_logits is not None and not sums_only,
        STORE_SUMS=stored_logits is not None and sums_only,
        **_host.padded_args(kv.capacity, q.device),
        **_host.split_args(workspace, "score", plan, pairs, splits, q.device),
        **_host.plan_args(plan, q, kv),
    )  # fmt: skip


def score(
    q: Tensor,
    kv: Any,
    visual: Any,
    params: Any,
    *,
    sums_only: bool,
    out: Tensor | None,
    workspace: Any,
    q_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read K once; return the stored logits, and (maximum, 1 / sum, mass) per head [B, H, 3].

    The logits are float32 [B, H, N], or with `sums_only` their sums over each group [B, G, N], N
    padded to whole tiles; only visible slots are written. The sum is at the temperature of the
    scores. `out` is filled with dense attention, unless it is None. Of several queries of a row,
    whose sums are not stored, each is a row of B * Q.
    """
    n_heads = q.shape[:-1].numel()  # of all rows
    n_stored = kv.batch * kv.kv_heads if sums_only else n_heads
    numel = n_stored * _host.padded_slots(kv.capacity, q.device)
    stored_logits = workspace.take("triton.logits", numel, torch.float32, q.device)
    head_stats = workspace.take("triton.head_stats", n_heads * 3, torch.float32, q.device)
    _launch(
        q, kv, visual, params, stored_logits=stored_logits, sums_only=sums_only,
        head_stats=head_stats, out=out, workspace=workspace, q_counts=q_counts,
    )  # fmt: skip
    return stored_logits, head_stats


def dense(
    q: Tensor,
    kv: Any,
    params: Any,
    *,
    out: Tensor,
    workspace: Any,
    q_counts: Tensor | None = None,
) -> Tensor:
    """Attend to all visible keys: softmax(scale * q @ k.T) @ v, in one launch."""
    _launch(
        q, kv, None, params, stored_logits=None, sums_only=False, head_stats=None,
        out=out, workspace=workspace, q_counts=q_counts,
    )  # fmt: skip
    return out
