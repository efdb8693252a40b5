"""Torch's own attention as a decode layer: the form that models call, and the best one.

q is [B, H, D], the cache contiguous, the result [B, H, D].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import KVCache
from ..config import PulseConfig


def grouped(q: Tensor, kv: KVCache) -> Tensor:
    """The heads of one KV head as its query rows: the strongest plain form."""
    folded = q.view(q.shape[0], kv.kv_heads, -1, q.shape[2])  # [B, G, R, D]
    return F.scaled_dot_product_attention(folded, kv.k, kv.v).reshape(q.shape)


def per_head(q: Tensor, kv: KVCache) -> Tensor:
    """Every query head by itself, as models of transformers call it by default."""
    heads = q[:, :, None]  # [B, H, 1, D]
    return F.scaled_dot_product_attention(heads, kv.k, kv.v, enable_gqa=True)[:, :, 0]


def gathered(q: Tensor, kv: KVCache, kept: Tensor) -> Tensor:
    """A follower in plain torch: copy the keys at `kept`, int64 [B, n], then `grouped`."""
    if kv.batch == 1:
        k, v = (t.index_select(2, kept[0]) for t in (kv.k, kv.v))
    else:
        at = kept[:, None, :, None].expand(-1, kv.kv_heads, -1, kv.head_dim)
        k, v = (t.gather(2, at) for t in (kv.k, kv.v))
    return grouped(q, KVCache(k, v))


def anchor(
    q: Tensor, kv: KVCache, candidates: Tensor, text: Tensor, kept: int, config: PulseConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The anchor in plain torch: whole logits, two softmaxes, `topk`, then a follower.

    `candidates` and `text` are the positions of visual and of text tokens, int64 [B, n]; `kept` is
    a host number, so nothing is read back. Returns the output, the attended positions, the mass.
    """
    folded = q.view(q.shape[0], kv.kv_heads, -1, q.shape[2])
    z = torch.matmul(folded, kv.k.transpose(2, 3)).float().flatten(1, 2) * q.shape[2] ** -0.5
    mass = (z / config.tau).softmax(-1)
    rows = candidates[:, None].expand(-1, z.shape[1], -1)
    mass = mass.gather(2, rows).sum(-1).amax(-1)  # [B]
    score = z.softmax(-1).mean(1).gather(1, candidates)
    best = candidates.gather(1, score.topk(kept).indices)
    positions = torch.cat((text, best), dim=1).sort().values
    return gathered(q, kv, positions), positions, mass
