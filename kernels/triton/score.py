"""One pass over the keys of a row: logits, softmax sums, and the dense output where it is wanted.

Grid (split, KV head, row). A split keeps its maximum, its sums at temperature 1 and tau, and its
weighted values; the last split of a KV head to arrive merges them in split order. So there is no
second launch, and the bits are the same whichever split arrives last.
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
    visible_range,
)

# What is kept of the logits: nothing, [B, H, N], or their sum over a group [B, G, N].
KEEP_NONE, KEEP_HEADS, KEEP_SUMS = 0, 1, 2
# Positions looked up at a time.
_WIDE: tl.constexpr = tl.constexpr(256)


@triton.jit(do_not_specialize=_host.PLAIN)
def _scan_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, z_ptr, final_ptr, stats_ptr, values_ptr, arrived_ptr,
    table_ptr, starts_ptr, lengths_ptr, spans_ptr, flags_ptr,
    scale, softcap, inv_tau, n_slots, n_tiles, window, n_pages, n_spans,
    stride_qb, stride_qh, stride_ob, stride_oh, stride_tb,
    stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    KEEP: tl.constexpr, MASS: tl.constexpr, OUT: tl.constexpr, RANK_TAU: tl.constexpr,
    SOFTCAP: tl.constexpr, PAGE: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    split, g, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin, end = visible_range(starts_ptr, lengths_ptr, b, n_slots, window)
    per_split, n_splits = split_of(end - begin, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    # the grid is sized by capacity, a row by its own length
    if split >= n_splits:
        return
    begin += split * per_split
    end = tl.minimum(begin + per_split, end)

    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    real = offs_r < GROUP
    mask_d = offs_d < D
    heads = g * GROUP + offs_r
    # [ROWS, BLOCK_D]
    q = tl.load(
        q_ptr + b * stride_qb + heads[:, None] * stride_qh + offs_d[None, :],
        mask=real[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    stride_kb, stride_vb = stride_kb.to(tl.int64) * UNIT, stride_vb.to(tl.int64) * UNIT
    stride_kn, stride_vn = stride_kn.to(tl.int64) * UNIT, stride_vn.to(tl.int64) * UNIT
    k_ptr += g * stride_kg.to(tl.int64) * UNIT
    if OUT:
        v_ptr += g * stride_vg.to(tl.int64) * UNIT
    row_of = b
    if PAGE > 0:
        # pages take the place of rows
        row_of = b * 0
        table_ptr += b * stride_tb
    row_g = b * tl.num_programs(1) + g
    if MASS:
        # searched once, apart from the keys: in the loop every thread of a key would repeat it
        flags_ptr += row_g * n_slots
        for n0 in range(begin, end, _WIDE):
            n = n0 + tl.arange(0, _WIDE)
            visual = is_visual(n, spans_ptr + b * n_spans * 2, n_spans, STEPS)
            tl.store(flags_ptr + n, visual.to(tl.int8), mask=n < end)
        tl.debug_barrier()

    m = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    total_tau = tl.zeros([ROWS], dtype=tl.float32)
    seen_tau = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for n0 in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = n0 + offs_n
        inside = n < end
        page, slot, seen = locate(n, inside, table_ptr, n_pages, PAGE)
        page += row_of
        tile = seen[:, None] & mask_d[None, :]
        # [BLOCK_N, BLOCK_D]
        at = (page * stride_kb + slot * stride_kn)[:, None] + offs_d[None, :]
        k = tl.load(k_ptr + at, mask=tile, other=0.0)
        # [ROWS, BLOCK_N]
        z = tl.dot(q, tl.trans(k), input_precision="ieee")
        z = finish_logits(z, seen[None, :], scale, softcap, SOFTCAP)
        if KEEP == 1:
            at = (row_g * GROUP + offs_r)[:, None] * (n_tiles * TILE) + n[None, :]
            tl.store(z_ptr + at, z, mask=real[:, None] & inside[None, :])
        if KEEP == 2:
            z_sum = tl.sum(tl.where(real[:, None], z, 0.0), axis=0)
            tl.store(z_ptr + row_g * (n_tiles * TILE) + n, z_sum, mask=inside)
        m_new = block_max(m, z)
        away = z - shift(m_new)[:, None]
        fade = m - shift(m_new)
        p = tl.exp(away)
        total = total * tl.exp(fade) + tl.sum(p, axis=1)
        if MASS:
            p_tau = tl.exp(away * inv_tau)
            fade_tau = tl.exp(fade * inv_tau)
            visual = tl.load(flags_ptr + n, mask=inside, other=0) != 0
            total_tau = total_tau * fade_tau + tl.sum(p_tau, axis=1)
            # the same order of addition, so a row of visual tokens alone has mass 1 exactly
            seen_tau = seen_tau * fade_tau + tl.sum(tl.where(visual[None, :], p_tau, 0.0), axis=1)
        if OUT:
            at = (page * stride_vb + slot * stride_vn)[:, None] + offs_d[None, :]
            v = tl.load(v_ptr + at, mask=tile, other=0.0)
            acc = acc * tl.exp(fade)[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new

    slots = tl.num_programs(0)
    STRIDE: tl.constexpr = 4 * ROWS
    stats_ptr += row_g * slots * STRIDE
    at = stats_ptr + split * STRIDE + offs_r
    tl.store(at, m)
    tl.store(at + ROWS, total)
    if MASS:
        tl.store(at + 2 * ROWS, total_tau)
        tl.store(at + 3 * ROWS, seen_tau)
    if OUT:
        values_ptr += row_g * slots * (ROWS * BLOCK_D)
        at = (split * ROWS + offs_r[:, None]) * BLOCK_D + offs_d[None, :]
        tl.store(values_ptr + at, acc, mask=real[:, None])
    if is_last(arrived_ptr + row_g, n_splits):
        m, total, total_tau, mass = merge_sums(
            stats_ptr, n_splits, inv_tau, STRIDE, ROWS, SPLITS, MASS
        )
        if MASS:
            # per head: maximum, one over the sum at the temperature of the ranking, mass
            rank_sum = total_tau if RANK_TAU else total
            to = final_ptr + (row_g * GROUP + offs_r) * 3
            tl.store(to, shift(m), mask=real)
            tl.store(to + 1, tl.where(rank_sum == 0, 0.0, 1.0 / rank_sum), mask=real)
            tl.store(to + 2, mass, mask=real)
        if OUT:
            acc = merge_values(stats_ptr, values_ptr, m, n_splits, STRIDE, GROUP, ROWS, BLOCK_D)
            store_out(out_ptr, acc, total, b, g, stride_ob, stride_oh, GROUP, ROWS, D, BLOCK_D)


def _launch(
    q: Tensor,
    kv: Any,
    visual: Any,
    params: Any,
    *,
    keep: int,
    z: Tensor | None,
    final: Tensor | None,
    out: Tensor | None,
    workspace: Any,
) -> None:
    heads, d = q.shape[1:]
    plan = _host.plan_of(q, kv, gather=False)
    splits = _host.splits_of(plan, kv.capacity)
    rows = kv.batch * kv.kv_heads
    stats, values, arrived = _host.scratch(workspace, "scan", plan, rows, splits, q.device)
    strides = _host.strides_of(kv)
    n_tiles, tile = _host.slot_tiles(kv.capacity, q.device)
    flags = None
    if visual is not None:
        flags = workspace.take("triton.scan.flags", rows * kv.capacity, torch.int8, q.device)
    stride_out = out.stride() if out is not None else (0, 0)
    n_spans = visual.spans.shape[1] if visual is not None else 0
    _scan_kernel[(splits, kv.kv_heads, kv.batch)](
        q, kv.k_data, kv.v_data, out, z, final, stats, values, arrived,
        starts_ptr=kv.starts, lengths_ptr=kv.lengths,
        spans_ptr=visual.spans if visual is not None else None, flags_ptr=flags,
        scale=params.scale, softcap=params.softcap, inv_tau=1.0 / params.tau,
        n_slots=kv.capacity, n_tiles=n_tiles, window=params.window, n_spans=n_spans,
        stride_qb=q.stride(0), stride_qh=q.stride(1),
        stride_ob=stride_out[0], stride_oh=stride_out[1],
        stride_kb=strides.k[0], stride_kg=strides.k[1], stride_kn=strides.k[2],
        stride_vb=strides.v[0], stride_vg=strides.v[1], stride_vn=strides.v[2],
        **_host.page_args(kv),
        KEEP=keep, MASS=visual is not None, OUT=out is not None,
        RANK_TAU=params.score == "prob_tau", SOFTCAP=params.softcap > 0,
        STEPS=_host.span_steps(n_spans), UNIT=strides.unit,
        GROUP=heads // kv.kv_heads, ROWS=plan.rows, D=d, BLOCK_D=plan.block_d,
        BLOCK_N=plan.block_n, STAGES=plan.stages,
        MIN_SPLIT=plan.min_split, MAX_SPLITS=plan.max_splits,
        SPLITS=triton.next_power_of_2(plan.max_splits), TILE=tile,
        num_warps=plan.warps, num_stages=plan.stages, **_host.register_cap(plan.registers),
    )  # fmt: skip


def scan(
    q: Tensor,
    kv: Any,
    visual: Any,
    params: Any,
    *,
    sums_only: bool,
    out: Tensor | None,
    workspace: Any,
) -> tuple[Tensor, Tensor]:
    """Read K once: give kept logits and, per head, (maximum, 1 / sum, visual mass) [B, H, 3].

    The logits are float32 [B, H, N], or with `sums_only` their sums over each group [B, G, N], with
    N padded to whole tiles; only visible slots are written. `out`, if given, is filled with dense
    attention.
    """
    kept = kv.kv_heads if sums_only else q.shape[1]
    n_tiles, tile = _host.slot_tiles(kv.capacity, q.device)
    z = workspace.take("triton.logits", kv.batch * kept * n_tiles * tile, torch.float32, q.device)
    final = workspace.take("triton.final", kv.batch * q.shape[1] * 3, torch.float32, q.device)
    keep = KEEP_SUMS if sums_only else KEEP_HEADS
    _launch(q, kv, visual, params, keep=keep, z=z, final=final, out=out, workspace=workspace)
    return z, final


def dense(q: Tensor, kv: Any, params: Any, *, out: Tensor, workspace: Any) -> Tensor:
    """Attend to all visible keys: softmax(scale * q @ k.T) @ v, in one launch."""
    _launch(q, kv, None, params, keep=KEEP_NONE, z=None, final=None, out=out, workspace=workspace)
    return out
