"""KV heads that run together over pages: the bits are those of head by head in one piece."""

import pytest
import torch

import visionpulse as vp
from visionpulse.backends import get
from visionpulse.float8 import stored
from visionpulse.testing.draw import Draws

REASON = get("cpu").unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")
SIZE, DIM = 1300, 64  # keys: more than one part, the last page not full
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": None}


def layouts(pages):
    """The same pages [P, G, slots, D] as engines lay them out: each a view of that shape."""
    k, v = pages
    packed = torch.cat((k.view(torch.uint8), v.view(torch.uint8)), 3).view(k.dtype)
    token_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pages]
    return {"apart": (k, v), "in one row": packed.chunk(2, 3), "by token": token_first}


def paged(kv, size, **scales):
    """`kv` in shuffled pages of every layout."""
    rows, heads = kv.k.shape[:2]
    count = -(-SIZE // size)
    table = torch.randperm(rows * count, generator=torch.Generator().manual_seed(1))
    pages = []
    for x in (kv.k, kv.v):
        bits = x.view(torch.uint8)
        room = bits.new_zeros(rows, heads, count * size, bits.shape[3])
        room[:, :, :SIZE] = bits
        split = room.view(rows, heads, count, size, -1).permute(0, 2, 1, 3, 4).flatten(0, 1)
        placed = torch.empty_like(split, memory_format=torch.contiguous_format)
        placed[table] = split
        pages.append(placed.view(x.dtype))
    table = table.int().view(rows, count)
    return {
        name: vp.PagedKVCache(*both, table, kv.lengths, kv.starts, "HND", **scales)
        for name, both in layouts(pages).items()
    }


def answers(q, kv, visual, window):
    config = vp.PulseConfig(ratio=(0.1, 0.4))
    wide = vp.PulseConfig(ratio=(0.1, 0.4), anchor_output="dense")
    scores = torch.empty(kv.batch, SIZE if not kv.is_paged else kv.capacity)
    out, kept = vp.decode(q, kv, visual, config, scores=scores, window=window, backend="cpu")
    dense, _ = vp.decode(q, kv, visual, wide, window=window, backend="cpu")
    follower = vp.attend(q, kv, visual, kept, window=window, backend="cpu")
    every = vp.attend(q, kv, window=window, backend="cpu")
    mine = (out, scores[:, :SIZE], kept.indices, kept.counts, kept.mass, dense, follower, every)
    return [x.clone() for x in mine]


@pytest.mark.parametrize("size", [16, 48, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group, heads", [(4, 4), (1, 6)])
def test_a_page_of_all_heads_gives_the_bits_of_one_head_after_another(dtype, size, group, heads):
    draws, scales = Draws(size), {}
    wide = DTYPES[dtype] or torch.bfloat16
    q = draws.normal(2, group * heads, DIM).to(wide)
    k, v = (draws.normal(2, heads, SIZE, DIM).to(wide) for _ in range(2))
    if dtype == "fp8":
        one = torch.linspace(0.01, 0.02, heads)
        k, v, scales = stored(k, one), stored(v, one), {"k_scale": one, "v_scale": one}
    # visual tokens begin and end within blocks and pages, and so do the keys of row 1
    visual = vp.VisualTokens.from_spans([[(37, 601), (610, 611), (700, 1171)]] * 2)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 21], [SIZE, SIZE - 77]))
    kv = vp.KVCache(k, v, lengths, starts, **scales)
    for window in (None, 517):
        wanted = answers(q, kv, visual, window)
        for name, pages in paged(kv, size, **scales).items():
            for at, (mine, its) in enumerate(
                zip(answers(q, pages, visual, window), wanted, strict=True)
            ):
                assert torch.equal(mine, its), (name, window, at)
