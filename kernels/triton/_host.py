"""What the launchers share: strides in provable units, span search depth, scratch buffers."""

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import tuning

# Arguments that Triton must not specialise on: a kernel that differed for N = 16 or B = 1 would
# be compiled again for each, and could add in another order.
PLAIN = [
    "n_slots", "window", "n_pages", "n_spans", "k_max", "heads", "n_tiles", "rows",
    "stride_qb", "stride_qh", "stride_ob", "stride_oh", "stride_tb",
    "stride_kb", "stride_kg", "stride_kn", "stride_vb", "stride_vg", "stride_vn",
]  # fmt: skip


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
        # an axis of one has an arbitrary stride that nobody walks
        alive = (kv.batch > 1, kv.kv_heads > 1, kv.capacity > 1)
        k, v = (tuple(s * a for s, a in zip(t, alive, strict=True)) for t in (k, v))
    unit = gcd(16 // kv.k_data.element_size(), *k, *v)
    return Strides(tuple(s // unit for s in k), tuple(s // unit for s in v), unit)


def slot_tiles(n_slots: int, device: torch.device) -> tuple[int, int]:
    """Tiles, and slots of a tile, that a row of kept logits or keys is padded to.

    The slots are a constant of the kernels, so the rows are provably aligned whatever N is.
    """
    tile = tuning.TABLE[tuning.target_of(device)[0]].rank_tile
    return triton.cdiv(n_slots, tile), tile


def span_steps(n_spans: int) -> int:
    """Steps of the binary search over spans, in coarse grades so that few kernels are compiled."""
    needed = n_spans.bit_length()
    return next((grade for grade in (1, 4, 8, 12) if needed <= grade), needed)


def plan_of(q: Tensor, kv: Any, gather: bool) -> tuning.Plan:
    """The launch constants for this query and cache."""
    target, sms = tuning.target_of(q.device)
    return tuning.plan(
        target, sms, kv_heads=kv.kv_heads, group=q.shape[1] // kv.kv_heads,
        head_dim=q.shape[2], itemsize=q.element_size(), gather=gather,
    )  # fmt: skip


def splits_of(plan: tuning.Plan, capacity: int) -> int:
    """Programs along a row: enough for the longest row there can be."""
    return min(plan.max_splits, triton.cdiv(capacity, plan.min_split))


def register_cap(registers: int) -> dict[str, int]:
    """The compiler's option for at most so many registers a thread; 0 for its own choice."""
    return {"maxnreg": registers} if registers else {}


def scratch(
    workspace: Any, kind: str, plan: tuning.Plan, rows: int, splits: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums, partial values and arrival counters for rows x splits programs."""
    numel = rows * splits * plan.rows
    return (
        workspace.take(f"triton.{kind}.stats", numel * 4, torch.float32, device),
        workspace.take(f"triton.{kind}.values", numel * plan.block_d, torch.float32, device),
        workspace.zeroed(f"triton.{kind}.arrived", rows, torch.int32, device),
    )


def page_args(kv: Any) -> dict[str, Any]:
    """Block table arguments of a kernel; a contiguous cache has none."""
    paged = kv.is_paged
    return {
        "table_ptr": kv.block_table if paged else None,
        "stride_tb": kv.block_table.stride(0) if paged else 0,
        "n_pages": kv.k_data.shape[0] if paged else 0,
        "PAGE": kv.page_size,
    }
