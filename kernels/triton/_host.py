"""What the launchers share: the keyword groups of a kernel call, and scratch buffers."""

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import tuning

# Arguments that Triton must not specialise on: a kernel that differed for N = 16 or B = 1 would
# be compiled again for each, and could add in another order.
PLAIN = [
    "n_slots", "window", "n_pages", "n_spans", "k_max", "n_heads", "n_tiles", "n_stored",
    "n_queries", "pass_queries",
    "stride_qb", "stride_qq", "stride_qh", "stride_ob", "stride_oq", "stride_oh", "stride_tb",
    "stride_kb", "stride_kg", "stride_kn", "stride_vb", "stride_vg", "stride_vn",
    "stride_ks", "stride_vs",
]  # fmt: skip
NO_PAGES: dict[str, Any] = {"table_ptr": None, "stride_tb": 0, "n_pages": 0, "PAGE": 0}


class Strides(NamedTuple):
    """Strides of K and V in units of `unit` elements."""

    k: tuple[int, int, int]
    v: tuple[int, int, int]
    unit: int


def strides_of(kv: Any) -> Strides:
    """Strides (outer, head, token) of K and V, and the largest useful unit that divides them.

    A kernel that multiplies by a constant unit can prove its loads aligned, whatever N is.
    """
    k, v = kv.k_strides, kv.v_strides
    if not kv.is_paged:
        # the stride of an axis of length one is arbitrary, and unused
        used = (kv.batch > 1, kv.kv_heads > 1, kv.capacity > 1)
        k, v = (tuple(s * u for s, u in zip(t, used, strict=True)) for t in (k, v))
    unit = gcd(16 // kv.k_data.element_size(), *k, *v)
    return Strides(tuple(s // unit for s in k), tuple(s // unit for s in v), unit)


def query_args(q: Tensor, out: Tensor | None) -> dict[str, Any]:
    """The query and the output, both [B, H, D] or [B, Q, H, D]."""
    to = q if out is None else out  # where there is none its strides are unused
    return {
        "q_ptr": q, "stride_qb": q.stride(0), "stride_qh": q.stride(-2),
        "out_ptr": out, "stride_ob": to.stride(0), "stride_oh": to.stride(-2),
        "stride_qq": q.stride(1) if q.dim() == 4 else 0,
        "stride_oq": to.stride(1) if q.dim() == 4 else 0,
    }  # fmt: skip


def several_args(queries: int, q_counts: Tensor | None) -> dict[str, Any]:
    """Several queries of a row; one is a kernel without that axis."""
    return {"SEVERAL": queries > 1, "n_queries": queries, "q_counts_ptr": q_counts}


def queries_of(q: Tensor) -> int:
    """Queries of a row in q, [B, H, D] or [B, Q, H, D]."""
    return q.shape[1] if q.dim() == 4 else 1


def cache_args(kv: Any) -> dict[str, Any]:
    """K, V, the block table; of float8_e4m3fn their bytes in pairs, if they can be, and scales."""
    (kb, kg, kn), (vb, vg, vn), unit = strides_of(kv)
    k, v, float8, k_scale, v_scale = kv.k_data, kv.v_data, 0, None, None
    if k.element_size() == 1:
        float8, k_scale, v_scale = tuning.table_of(k.device).float8, kv.k_scale, kv.v_scale
        if _has_pairs(k) and _has_pairs(v):
            k, v, unit = k.view(torch.uint16), v.view(torch.uint16), unit // 2
        else:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
    return {
        "k_ptr": k, "stride_kb": kb, "stride_kg": kg, "stride_kn": kn,
        "v_ptr": v, "stride_vb": vb, "stride_vg": vg, "stride_vn": vn,
        "k_scale_ptr": k_scale, "stride_ks": _scale_stride(k_scale),
        "v_scale_ptr": v_scale, "stride_vs": _scale_stride(v_scale),
        "UNIT": unit, "FLOAT8": float8, **page_args(kv),
    }  # fmt: skip


def _has_pairs(t: Tensor) -> bool:
    """Whether every vector begins at an even address and is of an even length."""
    of = (t.data_ptr(), t.storage_offset(), *t.stride()[:-1], t.shape[-1])
    return all(number % 2 == 0 for number in of)


def _scale_stride(scale: Tensor | None) -> int:
    """From the scale of a KV head to the next one's: 0 where all share one number."""
    return 0 if scale is None or scale.numel() == 1 else 1


def page_args(kv: Any) -> dict[str, Any]:
    """The block table; a contiguous cache has none."""
    if not kv.is_paged:
        return NO_PAGES
    table = kv.block_table
    return {
        "table_ptr": table, "stride_tb": table.stride(0), "n_pages": kv.k_data.shape[0],
        "PAGE": kv.page_size,
    }  # fmt: skip


def visible_args(
    starts: Tensor | None, lengths: Tensor | None, n_slots: int, window: int
) -> dict[str, Any]:
    """What bounds the visible keys of a row."""
    return {"starts_ptr": starts, "lengths_ptr": lengths, "n_slots": n_slots, "window": window}


def span_args(visual: Any) -> dict[str, Any]:
    """The visual spans; None has none."""
    if visual is None:
        return {"spans_ptr": None, "n_spans": 0, "STEPS": 0}
    n_spans = visual.spans.shape[1]
    return {"spans_ptr": visual.spans, "n_spans": n_spans, "STEPS": _search_steps(n_spans)}


def _search_steps(n_spans: int) -> int:
    """Steps of the binary search over spans, in coarse grades so that few kernels are compiled."""
    needed = n_spans.bit_length()
    return next((grade for grade in (1, 4, 8, 12) if needed <= grade), needed)


def padded_args(n_slots: int, device: torch.device) -> dict[str, int]:
    """Tiles that a row of stored logits or sort codes is padded to, and slots of a tile.

    The slots are a constant of the kernels, so every row is provably aligned whatever N is.
    """
    tile = tuning.table_of(device).select_tile
    return {"n_tiles": triton.cdiv(n_slots, tile), "TILE": tile}


def padded_slots(n_slots: int, device: torch.device) -> int:
    """Slots of a padded row."""
    padded = padded_args(n_slots, device)
    return padded["n_tiles"] * padded["TILE"]


def logit_args(params: Any, *, capped: bool = True) -> dict[str, Any]:
    """What turns q @ k into a logit; stored logits are `capped` no second time."""
    return {
        "scale": params.scale, "softcap": params.softcap,
        "SOFTCAP": capped and params.softcap > 0,
    }  # fmt: skip


def plan_of(q: Tensor, kv: Any, gather: bool, queries: int = 1) -> tuning.Plan:
    """The launch constants for this cache, a program with so many queries of a row."""
    target, sms = tuning.target_of(q.device)
    plan = tuning.plan(
        target, sms, kv_heads=kv.kv_heads, group=queries * (q.shape[-2] // kv.kv_heads),
        head_dim=q.shape[-1], itemsize=q.element_size(), gather=gather,
        float8=kv.k_data.element_size() == 1,
    )  # fmt: skip
    # the caps of the table fit a kernel of one query; where the dot has more to mask, they spill
    return plan if gather or q.dim() == 3 else plan._replace(registers=0)


def plan_args(plan: tuning.Plan, q: Tensor, kv: Any) -> dict[str, Any]:
    """Tiles and splits of a launch over keys, and the compiler's options."""
    return {
        "GROUP": q.shape[-2] // kv.kv_heads, "BLOCK_H": plan.block_h,
        "D": q.shape[-1], "BLOCK_D": plan.block_d, "BLOCK_N": plan.block_n, "STAGES": plan.stages,
        "MIN_SPLIT": plan.min_split, "MAX_SPLITS": plan.max_splits,
        "SPLITS": triton.next_power_of_2(plan.max_splits),
        "num_warps": plan.warps, "num_stages": plan.stages, **register_cap(plan.registers),
    }  # fmt: skip


def register_cap(registers: int) -> dict[str, int]:
    """The compiler's option for at most so many registers a thread; 0 for its own choice."""
    return {"maxnreg": registers} if registers else {}


def splits_of(plan: tuning.Plan, n_keys: int) -> int:
    """Programs along a row of at most `n_keys` keys."""
    return min(plan.max_splits, triton.cdiv(n_keys, plan.min_split))


def split_args(
    workspace: Any, stage: str, plan: tuning.Plan, pairs: int, splits: int, device: torch.device
) -> dict[str, Any]:
    """Partial sums, partial values and arrival counters of `pairs` of a row and a KV head."""
    numel = pairs * splits * plan.block_h
    take = workspace.take
    return {
        "split_stats_ptr": take(f"triton.{stage}.stats", numel * 4, torch.float32, device),
        "split_values_ptr": take(
            f"triton.{stage}.values", numel * plan.block_d, torch.float32, device
        ),
        "arrived_ptr": workspace.zeroed(f"triton.{stage}.arrived", pairs, torch.int32, device),
    }
