"""The oracle: the decode step of the contract, stage by stage, in plain torch.

Written to be read. It keeps whole [B, H, N] matrices, repeats K and V per query head, and sorts;
in return every line is a sentence of the definition. Float32 inside, float64 for float64 inputs.
"""

import torch
from torch import Tensor

from .budgets import clamp_count
from .cache import Cache, PagedKVCache
from .call import Call, Params, Scored
from .float8 import read
from .selection import Selection
from .visual import VisualTokens


def keys_and_values(kv: Cache, heads: int) -> tuple[Tensor, Tensor]:
    """K and V as [B, H, N, D] in the dtype of the arithmetic, pages put in order."""
    inner = torch.float64 if kv.dtype == torch.float64 else torch.float32
    k, v = dequantised(kv, inner)
    if isinstance(kv, PagedKVCache):
        pages = kv.block_table.long().clamp(0, k.shape[0] - 1)  # [B, pages]
        if kv.layout == "NHD":
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # [P, G, page, D]
        k, v = (t[pages].transpose(1, 2).flatten(2, 3) for t in (k, v))  # [B, G, N, D]
    group = heads // kv.kv_heads
    return tuple(t.repeat_interleave(group, dim=1) for t in (k, v))  # type: ignore[return-value]


def dequantised(kv: Cache, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What K and V stand for, in their own layout; of 8 bits it is exact in float64."""
    axis = kv.head_axis
    return (
        read(kv.k_data, kv.k_scale, axis, dtype),
        read(kv.v_data, kv.v_scale, axis, dtype),
    )


def visible_keys(
    size: int,
    rows: int,
    device: torch.device,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
) -> Tensor:
    """Which slots hold a key that this step may see: bool [B, N]."""
    n = torch.arange(size, device=device).expand(rows, -1)
    length = torch.full((rows, 1), size, device=device) if lengths is None else lengths[:, None]
    length = length.clamp(0, size)
    visible = n < length
    if starts is not None:
        visible = visible & (n >= starts[:, None])
    if window:
        visible = visible & (n > length - 1 - window)
    return visible


def visible_in(kv: Cache, params: Params) -> Tensor:
    """The visible slots of a cache; one whose page id lies outside the pool is not."""
    return visible_keys(
        kv.capacity, kv.batch, kv.device, kv.starts, kv.lengths, params.window
    ) & _has_page(kv)


def _has_page(kv: Cache) -> Tensor:
    """Slots whose page id lies in the pool; all of them in a contiguous cache."""
    if not isinstance(kv, PagedKVCache):
        return torch.ones(1, 1, dtype=torch.bool, device=kv.device)
    table = kv.block_table
    known = (table >= 0) & (table < kv.k_data.shape[0])
    return known.repeat_interleave(kv.page_size, dim=1)


def logits(q: Tensor, k: Tensor, visible: Tensor, params: Params) -> Tensor:
    """Scaled, capped, masked logits z: [B, H, N], -inf where not visible."""
    # a product and a sum per key, not a matmul: equal keys must give equal bits anywhere
    z = params.scale * (q.to(k.dtype)[:, :, None] * k).sum(-1)
    if params.softcap:
        z = params.softcap * torch.tanh(z / params.softcap)
    return z.masked_fill(~visible[:, None], -torch.inf)


def softmax(z: Tensor) -> Tensor:
    """Softmax over the keys; a row without visible keys gives zeros, a NaN spreads."""
    return z.softmax(-1).masked_fill((z == -torch.inf).all(-1, keepdim=True), 0.0)


def weigh(z: Tensor, v: Tensor, attended: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention output over the attended keys: [B, H, D]."""
    p = softmax(z.masked_fill(~attended[:, None], -torch.inf))
    v = v.masked_fill(~attended[:, None, :, None], 0.0)  # what lies in a dropped slot stays out
    return (p[:, :, None] @ v)[:, :, 0].to(dtype)


def mean_of_heads(t: Tensor) -> Tensor:
    """Mean over the heads of [B, H, N], summed in the same order at every position."""
    return t.transpose(1, 2).contiguous().mean(-1)


def score_of(z: Tensor, candidate: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, N] and the two masses [B] from logits."""
    p_tau = softmax(z / params.tau)
    per_head = p_tau.masked_fill(~candidate[:, None], 0.0).sum(-1)  # [B, H]
    mass, mass_mean = per_head.amax(1), per_head.mean(1)  # a NaN in any head makes both NaN
    if params.score == "logit":
        scores = mean_of_heads(z)
    elif params.score == "prob":
        scores = mean_of_heads(softmax(z))
    else:
        scores = mean_of_heads(p_tau)
    return scores.masked_fill(~candidate, -torch.inf), mass, mass_mean


def count_of(mass: Tensor, mass_mean: Tensor, n_visual: Tensor, params: Params) -> Tensor:
    """K of each row: int32 [B]."""
    if params.wanted is not None:
        return params.wanted.clamp(min=0).minimum(n_visual)
    chosen = mass if params.mass_of == "max" else mass_mean
    ratio = chosen if params.ratio is None else params.ratio
    return clamp_count(ratio, n_visual, params.r_min, params.r_max)


def top(scores: Tensor, candidate: Tensor, count: Tensor, k_max: int) -> Tensor:
    """The `count` best candidates of each row, ascending, -1 padded: int32 [B, K_max]."""
    size = scores.shape[1]
    n = torch.arange(size, device=scores.device).expand_as(scores)
    # three stable sorts, the last the strongest: by score, NaN behind, no candidate behind that
    order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = order.sort(dim=1, descending=True, stable=True).indices
    for last in (scores.isnan(), ~candidate):
        order = order.gather(1, last.gather(1, order).to(torch.int8).sort(dim=1, stable=True)[1])
    rank = torch.empty_like(order).scatter_(1, order, n)  # [B, N]
    kept = (rank < count[:, None]) & candidate
    ascending = torch.where(kept, n, size).sort(dim=1).values[:, :k_max]
    ascending = torch.where(ascending < size, ascending, -1).to(torch.int32)
    return torch.nn.functional.pad(ascending, (0, k_max - ascending.shape[1]), value=-1)


def select_of(
    scores: Tensor, mass: Tensor, mass_mean: Tensor, candidate: Tensor, params: Params
) -> Selection:
    """Budget and top-K over the candidates [B, N]."""
    n_visual = candidate.sum(1, dtype=torch.int32)
    count = count_of(mass, mass_mean, n_visual, params).clamp(max=params.k_max)
    indices = top(scores, candidate, count, params.k_max)
    return Selection(indices, count, mass, mass_mean, trusted=True)


def attended_keys(visible: Tensor, visual: VisualTokens, selection: Selection) -> Tensor:
    """Text keys and selected keys: bool [B, N]."""
    size = visible.shape[1]
    inside = torch.arange(selection.indices.shape[1], device=visible.device)
    inside = (inside < selection.counts[:, None]) & (selection.indices >= 0)
    inside = inside & (selection.indices < size)
    slots = torch.where(inside, selection.indices, size).long()  # slot `size` takes the padding
    kept = torch.zeros(len(visible), size + 1, dtype=torch.bool, device=visible.device)
    kept = kept.scatter(1, slots, True)[:, :size]
    return visible & (kept | ~visual.mask(size))


def score(call: Call) -> tuple[Scored, Tensor]:
    """Scores and masses, and the dense output [B, H, D]."""
    q, kv, params = call.q, call.kv, call.params
    k, v = keys_and_values(kv, q.shape[1])
    visible = visible_in(kv, params)
    z = logits(q, k, visible, params)
    candidate = visible & call.visual_set.mask(kv.capacity)
    return call.scored(*score_of(z, candidate, params)), weigh(z, v, visible, q.dtype)


def select(scored: Scored) -> Selection:
    """The selection from scores alone."""
    scores, params = scored.scores, scored.params
    rows, size = scores.shape
    cut = (scored.starts, scored.lengths, params.window)
    candidate = visible_keys(size, rows, scores.device, *cut) & scored.visual.mask(size)
    return select_of(scores, scored.mass, scored.mass_mean, candidate, params)


def attend(call: Call) -> Tensor:
    """Attention over text and selected keys, or over all of them: [B, H, D]."""
    q, kv, params = call.q, call.kv, call.params
    k, v = keys_and_values(kv, q.shape[1])
    visible = attended = visible_in(kv, params)
    if call.selection is not None:
        attended = attended_keys(visible, call.visual_set, call.selection)
    return weigh(logits(q, k, visible, params), v, attended, q.dtype)


def decode(call: Call) -> tuple[Tensor, Selection, Tensor]:
    """One step at the anchor: output [B, H, D], selection, and the scores [B, N] it ranked."""
    q, kv, visual, params = call.q, call.kv, call.visual_set, call.params
    k, v = keys_and_values(kv, q.shape[1])
    visible = visible_in(kv, params)
    candidate = visible & visual.mask(kv.capacity)
    z = logits(q, k, visible, params)
    scores, mass, mass_mean = score_of(z, candidate, params)
    selection = select_of(scores, mass, mass_mean, candidate, params)
    dense = params.anchor_output == "dense"
    attended = visible if dense else attended_keys(visible, visual, selection)
    return weigh(z, v, attended, q.dtype), selection, scores
