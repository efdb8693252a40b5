"""What is timed is checked first: outputs in float64, selections by their own scores."""

import torch
from torch import Tensor

from ..backends import get
from ..cache import KVCache
from ..call import Params
from ..config import PulseConfig
from ..ops import decode
from ..selection import Selection
from ..testing.compare import Exact, assert_output, assert_valid_selection
from .layers import Layers


def check_output(
    layers: Layers, turn: int, out: Tensor, selection: Selection | None, backend: str
) -> None:
    """Check the last KV head of each row: float64 of all heads would not fit at long contexts."""
    q, kv = layers.at(turn)
    group = q.shape[1] // kv.kv_heads
    rounds_weights = get(backend).rounds_weights(out.dtype)
    for b in range(kv.batch):
        row = torch.tensor([b], device=q.device)
        heads, alone = q[row, -group:], _last_head(kv, b)
        params = Params(scale=q.shape[2] ** -0.5)
        exact = Exact(heads, alone, layers.visual.rows(row), params)
        chosen = None if selection is None else selection.rows(row)
        assert_output(out[row, -group:], exact, chosen, rounds_weights=rounds_weights)


def _last_head(kv: KVCache, row: int) -> KVCache:
    """One row of the last KV head, with its scales."""
    k_scale, v_scale = (None if s is None else s[-1:] for s in (kv.k_scale, kv.v_scale))
    k, v = kv.k[row : row + 1, -1:], kv.v[row : row + 1, -1:]
    return KVCache(k, v, k_scale=k_scale, v_scale=v_scale)


def check_selection(
    layers: Layers, selection: Selection, config: PulseConfig, backend: str
) -> None:
    """Check what the anchor of turn 0 selected against the scores it ranked, and its count."""
    q, kv = layers.at(0)
    scores = torch.empty(kv.batch, kv.capacity, device=q.device)
    _, again = decode(q, kv, layers.visual, config, scores=scores, backend=backend)
    assert torch.equal(again.indices, selection.indices), "a second call selects otherwise"
    assert_valid_selection(selection, scores, layers.visual.mask(kv.capacity))
    kept = int(selection.counts[0])
    assert kept == layers.shape.kept, f"kept {kept}, wanted {layers.shape.kept}"
