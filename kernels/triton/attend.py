"""Attention over text and kept visual tokens, or the output of a pruned anchor.

A row's keys form one list: its text tokens, whose positions follow from the spans, then its kept
positions. Grid (split, KV head, row); a split gathers a stretch of that list, with the positions of
the next tile fetched before the arithmetic of this one, and the last split to arrive merges.
The anchor's own output uses the logits that were kept, so K is not read again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _host
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
    text_position,
    visible_range,
    visual_before,
)

# List entries looked up at a time.
_WIDE: tl.constexpr = tl.constexpr(256)


@triton.jit
def _positions(
    j, stop, n_text, first_text, spans_ptr, offsets_ptr, indices_ptr, n_spans, begin, end,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Positions of list entries j, -1 where nothing is attended; j < n_text is text."""
    inside = j < stop
    is_text = inside & (j < n_text)
    rank = tl.where(is_text, j, 0) + first_text
    text = text_position(rank, spans_ptr, offsets_ptr, n_spans, STEPS)
    is_kept = inside & (j >= n_text)
    kept = tl.load(indices_ptr + (j - n_text), mask=is_kept, other=-1)
    # an index out of range or outside the window is skipped; one that points at text is in already
    is_kept = is_kept & (kept >= begin) & (kept < end)
    is_kept = is_kept & is_visual(kept, spans_ptr, n_spans, STEPS)
    return tl.where(is_text, text, tl.where(is_kept, kept, -1))


@triton.jit(do_not_specialize=_host.PLAIN)
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, z_ptr, stats_ptr, values_ptr, arrived_ptr,
    indices_ptr, counts_ptr, list_ptr, table_ptr, starts_ptr, lengths_ptr, spans_ptr,
    offsets_ptr, scale, softcap, n_slots, n_tiles, window, n_pages, n_spans, k_max,
    stride_qb, stride_qh, stride_ob, stride_oh, stride_tb,
    stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    KEPT: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr, STEPS: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    split, g, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin, end = visible_range(starts_ptr, lengths_ptr, b, n_slots, window)
    spans_ptr += b * n_spans * 2
    offsets_ptr += b * (n_spans + 1)
    first_text = begin - visual_before(begin, spans_ptr, offsets_ptr, n_spans, STEPS)
    n_text = end - visual_before(end, spans_ptr, offsets_ptr, n_spans, STEPS) - first_text
    n_list = n_text + tl.minimum(tl.maximum(tl.load(counts_ptr + b), 0), k_max)
    per_split, n_splits = split_of(n_list, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    # the grid is sized by capacity, a row by its own text and count
    if split >= n_splits:
        return
    start = split * per_split
    stop = tl.minimum(start + per_split, n_list)

    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    real = offs_r < GROUP
    mask_d = offs_d < D
    heads = g * GROUP + offs_r
    if not KEPT:
        # [ROWS, BLOCK_D]
        q = tl.load(
            q_ptr + b * stride_qb + heads[:, None] * stride_qh + offs_d[None, :],
            mask=real[:, None] & mask_d[None, :], other=0.0,
        )  # fmt: skip
        k_ptr += g * stride_kg.to(tl.int64) * UNIT
    v_ptr += g * stride_vg.to(tl.int64) * UNIT
    stride_kb, stride_vb = stride_kb.to(tl.int64) * UNIT, stride_vb.to(tl.int64) * UNIT
    stride_kn, stride_vn = stride_kn.to(tl.int64) * UNIT, stride_vn.to(tl.int64) * UNIT
    row_of = b
    if PAGE > 0:
        # pages take the place of rows
        row_of = b * 0
        table_ptr += b * stride_tb
    row_g = b * tl.num_programs(1) + g
    # looked up once, apart from the keys: in the loop every thread of a key would repeat it
    list_ptr += row_g * (n_slots + k_max)
    for j in range(start, stop, _WIDE):
        entry = j + tl.arange(0, _WIDE)
        pos = _positions(
            entry, stop, n_text, first_text, spans_ptr, offsets_ptr, indices_ptr + b * k_max,
            n_spans, begin, end, STEPS,
        )  # fmt: skip
        tl.store(list_ptr + entry, pos, mask=entry < stop)
    tl.debug_barrier()

    m = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    pos = tl.load(list_ptr + start + offs_n, mask=start + offs_n < stop, other=-1)
    for j in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        page, slot, seen = locate(pos, pos >= 0, table_ptr, n_pages, PAGE)
        page += row_of
        tile = seen[:, None] & mask_d[None, :]
        if KEPT:
            # [ROWS, BLOCK_N]
            at = (row_g * GROUP + offs_r)[:, None] * (n_tiles * TILE) + pos[None, :]
            z = tl.load(z_ptr + at, mask=real[:, None] & seen[None, :], other=float("-inf"))
        else:
            # [BLOCK_N, BLOCK_D]
            at = (page * stride_kb + slot * stride_kn)[:, None] + offs_d[None, :]
            k = tl.load(k_ptr + at, mask=tile, other=0.0)
        at = (page * stride_vb + slot * stride_vn)[:, None] + offs_d[None, :]
        v = tl.load(v_ptr + at, mask=tile, other=0.0)
        # the next tile's positions travel while this tile is added
        ahead = j + BLOCK_N + offs_n
        pos = tl.load(list_ptr + ahead, mask=ahead < stop, other=-1)
        if not KEPT:
            z = tl.dot(q, tl.trans(k), input_precision="ieee")
            z = finish_logits(z, seen[None, :], scale, softcap, SOFTCAP)
        m_new = block_max(m, z)
        fade = tl.exp(m - shift(m_new))
        p = tl.exp(z - shift(m_new)[:, None])
        total = total * fade + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        m = m_new

    slots = tl.num_programs(0)
    STRIDE: tl.constexpr = 4 * ROWS
    stats_ptr += row_g * slots * STRIDE
    values_ptr += row_g * slots * (ROWS * BLOCK_D)
    tl.store(stats_ptr + split * STRIDE + offs_r, m)
    tl.store(stats_ptr + split * STRIDE + ROWS + offs_r, total)
    at = (split * ROWS + offs_r[:, None]) * BLOCK_D + offs_d[None, :]
    tl.store(values_ptr + at, acc, mask=real[:, None])
    if is_last(arrived_ptr + row_g, n_splits):
        m, total, _, _ = merge_sums(stats_ptr, n_splits, 1.0, STRIDE, ROWS, SPLITS, False)
        acc = merge_values(stats_ptr, values_ptr, m, n_splits, STRIDE, GROUP, ROWS, BLOCK_D)
        store_out(out_ptr, acc, total, b, g, stride_ob, stride_oh, GROUP, ROWS, D, BLOCK_D)


def attend(
    q: Tensor,
    kv: Any,
    visual: Any,
    indices: Tensor,
    counts: Tensor,
    params: Any,
    *,
    logits: Tensor | None,
    out: Tensor,
    workspace: Any,
) -> Tensor:
    """Attend to text and to `indices` [B, K_max]; `logits` [B, H, N] stand in for q and K."""
    d = q.shape[2]
    plan = _host.plan_of(q, kv, gather=True)
    n_spans, k_max = visual.spans.shape[1], indices.shape[1]
    # unique positions fit the slots; a list from elsewhere may not, and must still be merged
    splits = _host.splits_of(plan, kv.capacity + k_max)
    rows = kv.batch * kv.kv_heads
    stats, values, arrived = _host.scratch(workspace, "attend", plan, rows, splits, q.device)
    strides = _host.strides_of(kv)
    n_tiles, tile = _host.slot_tiles(kv.capacity, q.device)
    listed = workspace.take(
        "triton.attend.list", rows * (kv.capacity + k_max), torch.int32, q.device
    )
    kept = logits is not None
    _attend_kernel[(splits, kv.kv_heads, kv.batch)](
        q, kv.k_data, kv.v_data, out, logits, stats, values, arrived, indices, counts,
        list_ptr=listed, starts_ptr=kv.starts, lengths_ptr=kv.lengths,
        spans_ptr=visual.spans, offsets_ptr=visual.offsets,
        scale=params.scale, softcap=params.softcap,
        n_slots=kv.capacity, n_tiles=n_tiles, window=params.window, n_spans=n_spans, k_max=k_max,
        stride_qb=q.stride(0), stride_qh=q.stride(1),
        stride_ob=out.stride(0), stride_oh=out.stride(1),
        stride_kb=strides.k[0], stride_kg=strides.k[1], stride_kn=strides.k[2],
        stride_vb=strides.v[0], stride_vg=strides.v[1], stride_vn=strides.v[2],
        **_host.page_args(kv),
        KEPT=kept, SOFTCAP=params.softcap > 0 and not kept,
        STEPS=_host.span_steps(n_spans), UNIT=strides.unit,
        GROUP=q.shape[1] // kv.kv_heads, ROWS=plan.rows, D=d, BLOCK_D=plan.block_d,
        BLOCK_N=plan.block_n, STAGES=plan.stages,
        MIN_SPLIT=plan.min_split, MAX_SPLITS=plan.max_splits,
        SPLITS=triton.next_power_of_2(plan.max_splits), TILE=tile,
        num_warps=plan.warps, num_stages=plan.stages, **_host.register_cap(plan.registers),
    )  # fmt: skip
    return out
