"""The published implementation's decode step, in its own scheme, to compare with.

Written from its description: keys and values repeated for every query head in every layer, blocks
of 64 tokens scored by the largest logit in each, `torch.topk` and a sort, a whole row of keys in
one piece, and the host reads the budget and the counts. The anchor's output is dense.

Defined, for one row with logits z [H, N] cut into blocks, W the blocks of visual tokens only, by

    p = softmax(z.blocks(64).amax(-1) / tau)                      # [H, blocks], per head
    M = p[:, W].sum(-1).max()
    K = ceil(clamp(M, r_min, r_max) * N_v / 64)                   # at least 1, at most len(W)
    kept = every block outside W, and W[p.mean(0)[W].topk(K)]     # followers attend to these
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visionpulse.cache import KVCache
from visionpulse.config import PulseConfig
from visionpulse.visual import VisualTokens

BLOCK = 64


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks that an anchor selected: per row, ascending, -1 padded; and the masses."""

    indices: Tensor  # int64 [B, most]
    counts: tuple[int, ...]  # kept blocks of each row, text included; on the host
    visual: tuple[int, ...]  # wholly visual ones among them
    mass: Tensor  # float32 [B]


def repeated(t: Tensor, heads: int) -> Tensor:
    """K or V [B, G, N, D] copied for every query head: [B, H, N, D]."""
    return t.repeat_interleave(heads // t.shape[1], dim=1)


def dense(q: Tensor, kv: KVCache) -> Tensor:
    """A layer before the anchor: attention over all keys, [B, H, D]."""
    return _weigh(*_logits(q, kv)[:2], q.dtype)


def anchor(
    q: Tensor, kv: KVCache, visual: VisualTokens, config: PulseConfig
) -> tuple[Tensor, Blocks]:
    """Dense attention of the anchor, and the blocks that its followers attend to."""
    z, v, visible = _logits(q, kv)
    maxima = _blocks(z, -torch.inf).amax(-1)  # [B, H, blocks]
    return _weigh(z, v, q.dtype), select(maxima, visible, visual, config)


def select(maxima: Tensor, visible: Tensor, visual: VisualTokens, config: PulseConfig) -> Blocks:
    """Select blocks by their largest logits [B, H, blocks]; `visible` is bool [B, N]."""
    is_visual = visual.mask(visible.shape[1]) & visible
    p = (maxima / config.tau).softmax(-1)
    used = _blocks(visible, False).any(-1)  # [B, blocks]
    wholly = used & ~_blocks(visible & ~is_visual, False).any(-1)
    mass = (p * wholly[:, None]).sum(-1).amax(-1)  # [B]
    score = p.mean(1).masked_fill(~wholly, -torch.inf)  # [B, blocks]
    low, high = config.ratio
    rows, visual_counts = [], []
    for b in range(visible.shape[0]):
        ratio = min(max(mass[b].item(), low), high)
        wanted = math.ceil(ratio * is_visual[b].sum().item() / BLOCK)
        count = min(max(wanted, 1), int(wholly[b].sum().item()))
        best = score[b].topk(count).indices
        others = (used[b] & ~wholly[b]).nonzero().flatten()
        rows.append(torch.cat((others, best)).sort().values)
        visual_counts.append(count)
    indices = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return Blocks(indices, tuple(len(row) for row in rows), tuple(visual_counts), mass)


def follower(q: Tensor, kv: KVCache, blocks: Blocks) -> Tensor:
    """A layer after the anchor: attention over the kept blocks, [B, H, D]."""
    k, v = repeated(kv.k, q.shape[1]), repeated(kv.v, q.shape[1])
    visible = visible_keys(kv)
    within = torch.arange(BLOCK, device=q.device)
    rows = []
    for b, count in enumerate(blocks.counts):
        slots = (blocks.indices[b, :count, None] * BLOCK + within).flatten()
        slots = slots[slots < kv.capacity]
        slots = slots[visible[b, slots]]
        z = _scaled(q[b : b + 1], k[b : b + 1, :, slots])
        rows.append(_weigh(z, v[b : b + 1, :, slots], q.dtype))
    return torch.cat(rows)


def visible_keys(kv: KVCache) -> Tensor:
    """Which slots a step may see: bool [B, N]."""
    n = torch.arange(kv.capacity, device=kv.device)[None]
    visible = torch.ones(kv.batch, kv.capacity, dtype=torch.bool, device=kv.device)
    if kv.lengths is not None:
        visible = visible & (n < kv.lengths[:, None])
    if kv.starts is not None:
        visible = visible & (n >= kv.starts[:, None])
    return visible


def _scaled(q: Tensor, k: Tensor) -> Tensor:
    """Logits [B, H, N] in float32 of products in the inputs' dtype."""
    z = torch.matmul(q[:, :, None], k.transpose(2, 3))[:, :, 0]
    scale: float = q.shape[2] ** -0.5
    return z.to(_inner(q)) * scale


def _logits(q: Tensor, kv: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, H, N], -inf where hidden; the repeated values; which keys are visible [B, N]."""
    z = _scaled(q, repeated(kv.k, q.shape[1]))
    visible = visible_keys(kv)
    return z.masked_fill(~visible[:, None], -torch.inf), repeated(kv.v, q.shape[1]), visible


def _weigh(z: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.matmul(z.softmax(-1).to(dtype)[:, :, None], v)[:, :, 0]


def _blocks(t: Tensor, fill: float | bool) -> Tensor:
    """The last axis in blocks of 64, the last one padded: [..., blocks, 64]."""
    short = -t.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(t, (0, short), value=fill)
    return padded.view(*t.shape[:-1], -1, BLOCK)


def _inner(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
