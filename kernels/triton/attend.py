"""Attention over text and kept visual tokens, in a follower or for a pruned anchor's output.

The attended keys of a row form one list: its text tokens, whose positions follow from the spans,
then its kept tokens. Grid (split, KV head, row). A split gathers a part of the list, loading the
positions of the next tile before the arithmetic of the current one; the last split to arrive
merges. An anchor uses its stored logits, so K is not read again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _host
from ._float8 import lift_of, load_columns, load_query, scale_of, weights_of
from ._math import (
    block_max,
    finish_logits,
    is_last,
    is_visual,
    locate,
    merge_sums,
    merge_values,
    range_of_row,
    shift,
    split_of,
    store_out,
    text_position,
    visual_before,
)

# List entries looked up at a time.
_WIDE: tl.constexpr = tl.constexpr(256)


@triton.jit
def _positions(
    j, stop, n_text, first_text, spans_ptr, offsets_ptr, indices_ptr, n_spans, begin, end,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Positions of list entries j, -1 where none is attended; j < n_text is text."""
    inside = j < stop
    is_text = inside & (j < n_text)
    t = tl.where(is_text, j, 0) + first_text
    text = text_position(t, spans_ptr, offsets_ptr, n_spans, STEPS)
    is_kept = inside & (j >= n_text)
    kept = tl.load(indices_ptr + (j - n_text), mask=is_kept, other=-1)
    # skip an index out of range or outside the window, and one of a text token: it is listed above
    is_kept = is_kept & (kept >= begin) & (kept < end)
    is_kept = is_kept & is_visual(kept, spans_ptr, n_spans, STEPS)
    return tl.where(is_text, text, tl.where(is_kept, kept, -1))


@triton.jit(do_not_specialize=_host.PLAIN)
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, logits_ptr, split_stats_ptr, split_values_ptr, arrived_ptr,
    indices_ptr, counts_ptr, list_ptr, table_ptr, starts_ptr, lengths_ptr, q_counts_ptr,
    spans_ptr, offsets_ptr, scale, softcap, n_slots, n_tiles, window, n_pages, n_spans, k_max,
    n_queries, stride_qb, stride_qq, stride_qh, stride_ob, stride_oq, stride_oh, stride_tb,
    stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn, k_scale_ptr, v_scale_ptr,
    stride_ks, stride_vs, FLOAT8: tl.constexpr,
    SEVERAL: tl.constexpr, STORED_LOGITS: tl.constexpr, SOFTCAP: tl.constexpr,
    PAGE: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    split, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)  # of the selection: each query is one
    b, query, begin, end = range_of_row(
        row, starts_ptr, lengths_ptr, q_counts_ptr, n_slots, window, n_queries, SEVERAL
    )
    spans_ptr += b * n_spans * 2
    offsets_ptr += b * (n_spans + 1)
    first_text = begin - visual_before(begin, spans_ptr, offsets_ptr, n_spans, STEPS)
    n_text = end - visual_before(end, spans_ptr, offsets_ptr, n_spans, STEPS) - first_text
    n_list = n_text + tl.minimum(tl.maximum(tl.load(counts_ptr + row), 0), k_max)
    per_split, n_splits = split_of(n_list, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    # the grid is sized by capacity, a row by its own text and count
    if split >= n_splits:
        return
    start = split * per_split
    stop = tl.minimum(start + per_split, n_list)

    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    is_head = offs_h < GROUP
    mask_d = offs_d < D
    head = g * GROUP + offs_h
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    logit_scale = scale
    if FLOAT8:
        acc_even = tl.zeros([BLOCK_H, BLOCK_D // 2], dtype=tl.float32)
        acc_odd = acc_even
    if not STORED_LOGITS:
        q_at = b * stride_qb + query * stride_qq + head * stride_qh
        if FLOAT8:
            q_even, q_odd, unit = load_query(q_ptr, q_at, is_head, D, BLOCK_D)
            logit_scale = (scale * scale_of(k_scale_ptr, g, stride_ks) * unit)[:, None]
        else:
            # [BLOCK_H, BLOCK_D]
            q = tl.load(
                q_ptr + q_at[:, None] + offs_d[None, :],
                mask=is_head[:, None] & mask_d[None, :], other=0.0,
            )  # fmt: skip
        k_ptr += g * stride_kg.to(tl.int64) * UNIT
    v_ptr += g * stride_vg.to(tl.int64) * UNIT
    stride_kb, stride_vb = stride_kb.to(tl.int64) * UNIT, stride_vb.to(tl.int64) * UNIT
    stride_kn, stride_vn = stride_kn.to(tl.int64) * UNIT, stride_vn.to(tl.int64) * UNIT
    outer = b
    if PAGE > 0:
        # the outer axis of a paged cache is the page
        outer = b * 0
        table_ptr += b * stride_tb
    pair = row * tl.num_programs(1) + g  # of row and KV head
    # looked up once, ahead of the loop over keys: there every thread of a key would repeat it
    list_ptr += pair * (n_slots + k_max)
    for j in range(start, stop, _WIDE):
        entry = j + tl.arange(0, _WIDE)
        pos = _positions(
            entry, stop, n_text, first_text, spans_ptr, offsets_ptr, indices_ptr + row * k_max,
            n_spans, begin, end, STEPS,
        )  # fmt: skip
        tl.store(list_ptr + entry, pos, mask=entry < stop)
    tl.debug_barrier()

    m = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    pos = tl.load(list_ptr + start + offs_n, mask=start + offs_n < stop, other=-1)
    for j in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        page, slot, valid = locate(pos, pos >= 0, table_ptr, n_pages, PAGE)
        page += outer
        tile = valid[:, None] & mask_d[None, :]
        if STORED_LOGITS:
            # [BLOCK_H, BLOCK_N]
            at = (pair * GROUP + offs_h)[:, None] * (n_tiles * TILE) + pos[None, :]
            stored = is_head[:, None] & valid[None, :]
            z = tl.load(logits_ptr + at, mask=stored, other=float("-inf"))
        else:
            k_at = page * stride_kb + slot * stride_kn
            if FLOAT8:
                k_even, k_odd = load_columns(k_ptr, k_at, valid, dtype, D, BLOCK_D, FLOAT8)
            else:
                # [BLOCK_N, BLOCK_D]
                k = tl.load(k_ptr + k_at[:, None] + offs_d[None, :], mask=tile, other=0.0)
        v_at = page * stride_vb + slot * stride_vn
        if FLOAT8:
            v_even, v_odd = load_columns(v_ptr, v_at, valid, dtype, D, BLOCK_D, FLOAT8)
        else:
            v = tl.load(v_ptr + v_at[:, None] + offs_d[None, :], mask=tile, other=0.0)
        # load the next tile's positions ahead of this tile's arithmetic
        ahead = j + BLOCK_N + offs_n
        pos = tl.load(list_ptr + ahead, mask=ahead < stop, other=-1)
        if not STORED_LOGITS:
            if FLOAT8:
                z = tl.dot(q_even, tl.trans(k_even), input_precision="ieee")
                z = tl.dot(q_odd, tl.trans(k_odd), z, input_precision="ieee")
            else:
                z = tl.dot(q, tl.trans(k), input_precision="ieee")
            z = finish_logits(z, valid[None, :], logit_scale, softcap, SOFTCAP)
        m_new = block_max(m, z)
        rescale = tl.exp(m - shift(m_new))
        p = tl.exp(z - shift(m_new)[:, None])
        total = total * rescale + tl.sum(p, axis=1)
        rescale = rescale[:, None]
        if FLOAT8:
            p = weights_of(p, dtype)
            acc_even = tl.dot(p, v_even, acc_even * rescale, input_precision="ieee")
            acc_odd = tl.dot(p, v_odd, acc_odd * rescale, input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * rescale, input_precision="ieee")
        m = m_new

    if FLOAT8:
        acc = tl.interleave(acc_even, acc_odd)
    slots = tl.num_programs(0)
    STRIDE: tl.constexpr = 4 * BLOCK_H
    split_stats_ptr += pair * slots * STRIDE
    split_values_ptr += pair * slots * (BLOCK_H * BLOCK_D)
    tl.store(split_stats_ptr + split * STRIDE + offs_h, m)
    tl.store(split_stats_ptr + split * STRIDE + BLOCK_H + offs_h, total)
    at = (split * BLOCK_H + offs_h[:, None]) * BLOCK_D + offs_d[None, :]
    tl.store(split_values_ptr + at, acc, mask=is_head[:, None])
    if is_last(arrived_ptr + pair, n_splits):
        m, total, _, _ = merge_sums(split_stats_ptr, n_splits, 1.0, STRIDE, BLOCK_H, SPLITS, False)
        acc = merge_values(
            split_stats_ptr, split_values_ptr, m, n_splits, STRIDE, is_head, BLOCK_H, BLOCK_D
        )
        if FLOAT8:
            acc *= scale_of(v_scale_ptr, g, stride_vs) / lift_of(dtype)
        out_ptr += b * stride_ob + query * stride_oq
        store_out(out_ptr, head * stride_oh, acc, total, is_head, D, BLOCK_D)


def attend(
    q: Tensor,
    kv: Any,
    visual: Any,
    indices: Tensor,
    counts: Tensor,
    params: Any,
    *,
    stored_logits: Tensor | None,
    out: Tensor,
    workspace: Any,
    q_counts: Tensor | None = None,
) -> Tensor:
    """Attend to text and to `indices` [B, K_max]; `stored_logits` [B, H, N] replace q and K.

    Of several queries of a row, each has a list of its own, and is a row of B * Q.
    """
    queries = _host.queries_of(q)
    rows = kv.batch * queries
    plan = _host.plan_of(q, kv, gather=True)
    k_max = indices.shape[1]
    # unique positions fit the slots; an index list of a caller's own may not, and must be merged
    n_listed = kv.capacity + k_max
    splits = _host.splits_of(plan, n_listed)
    pairs = rows * kv.kv_heads
    listed = workspace.take("triton.attend.list", pairs * n_listed, torch.int32, q.device)
    stored = stored_logits is not None
    _attend_kernel[(splits, kv.kv_heads, rows)](
        **_host.query_args(q, out),
        **_host.several_args(queries, q_counts),
        **_host.cache_args(kv),
        **_host.visible_args(kv.starts, kv.lengths, kv.capacity, params.window),
        **_host.span_args(visual), offsets_ptr=visual.offsets,
        indices_ptr=indices, counts_ptr=counts, k_max=k_max, list_ptr=listed,
        **_host.logit_args(params, capped=not stored),
        logits_ptr=stored_logits, STORED_LOGITS=stored,
        **_host.padded_args(kv.capacity, q.device),
        **_host.split_args(workspace, "attend", plan, pairs, splits, q.device),
        **_host.plan_args(plan, q, kv),
    )  # fmt: skip
    return out
