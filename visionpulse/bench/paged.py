"""A cache as engines keep it: shuffled pages, K and V of a token side by side in one row."""

import torch

from ..cache import KVCache, PagedKVCache


def in_pages(kv: KVCache, size: int, seed: int = 0) -> PagedKVCache:
    """The same numbers in shuffled pages of `size` tokens; N must be whole pages."""
    rows, heads, keys, dim = kv.k.shape
    if keys % size or kv.lengths is not None or kv.starts is not None:
        raise ValueError(f"takes whole pages of {size} keys in every row, got {keys}")
    count = keys // size
    generator = torch.Generator(kv.device).manual_seed(seed)
    table = torch.randperm(rows * count, generator=generator, device=kv.device)
    both = torch.empty(rows * count, heads, size, 2 * dim, dtype=kv.dtype, device=kv.device)
    for at, x in enumerate((kv.k, kv.v)):
        pages = x.view(rows, heads, count, size, dim).transpose(1, 2).flatten(0, 1)
        bits = both[..., at * dim : (at + 1) * dim].view(torch.uint8)  # no index of 8 bits floats
        bits[table] = pages.view(torch.uint8)
    k, v = both.chunk(2, 3)
    lengths = torch.full((rows,), keys, dtype=torch.int32, device=kv.device)
    ids = table.int().view(rows, count)
    return PagedKVCache(k, v, ids, lengths, layout="HND", k_scale=kv.k_scale, v_scale=kv.v_scale)
