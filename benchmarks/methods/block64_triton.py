"""The published scheme's attention as Triton kernels, for a GPU: see block64.py.

Faithful to its description, the slow parts included: one program of two warps per row and query
head reads all keys of the repeated cache in blocks of 64, and writes float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import visionpulse as vp

from . import block64
from .block64 import BLOCK, Blocks, repeated, select, visible_keys


@triton.jit
def _dense_kernel(
    q_ptr, k_ptr, v_ptr, visible_ptr, out_ptr, max_ptr, scale, n_keys, heads, D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of one row: attention over all keys, and the largest logit of every block."""
    head = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, D)
    q = tl.load(q_ptr + head * D + offs_d).to(tl.float32)  # [D]
    acc = tl.zeros([D], tl.float32)
    m = -float("inf")
    total = 0.0
    n_blocks = tl.cdiv(n_keys, BLOCK_N)
    for block in range(n_blocks):
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row_visible_ptr = visible_ptr + (head // heads) * n_keys
        visible = tl.load(row_visible_ptr + offs_n, offs_n < n_keys, other=0) != 0
        at = (head * n_keys + offs_n)[:, None] * D + offs_d[None, :]  # [BLOCK_N, D]
        k = tl.load(k_ptr + at, visible[:, None], other=0.0).to(tl.float32)
        z = tl.where(visible, tl.sum(q[None, :] * k, 1) * scale, -float("inf"))  # [BLOCK_N]
        largest = tl.max(z, 0)
        tl.store(max_ptr + head * n_blocks + block, largest)
        m_new = tl.maximum(m, largest)
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        weight = tl.exp(z - shift)
        rescale = tl.exp(m - shift)
        v = tl.load(v_ptr + at, visible[:, None], other=0.0).to(tl.float32)
        acc = acc * rescale + tl.sum(weight[:, None] * v, 0)
        total = total * rescale + tl.sum(weight, 0)
        m = m_new
    tl.store(out_ptr + head * D + offs_d, acc / total)


@triton.jit
def _follower_kernel(
    q_ptr, k_ptr, v_ptr, visible_ptr, out_ptr, block_ptr, count_ptr, scale, n_keys, heads, most,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of one row: attention over the blocks of a list."""
    head = tl.program_id(0).to(tl.int64)
    row = head // heads
    offs_d = tl.arange(0, D)
    q = tl.load(q_ptr + head * D + offs_d).to(tl.float32)  # [D]
    acc = tl.zeros([D], tl.float32)
    m = -float("inf")
    total = 0.0
    for i in range(tl.load(count_ptr + row)):
        block = tl.load(block_ptr + row * most + i)
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = tl.load(visible_ptr + row * n_keys + offs_n, offs_n < n_keys, other=0) != 0
        at = (head * n_keys + offs_n)[:, None] * D + offs_d[None, :]  # [BLOCK_N, D]
        k = tl.load(k_ptr + at, visible[:, None], other=0.0).to(tl.float32)
        z = tl.where(visible, tl.sum(q[None, :] * k, 1) * scale, -float("inf"))  # [BLOCK_N]
        m_new = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        weight = tl.exp(z - shift)
        rescale = tl.exp(m - shift)
        v = tl.load(v_ptr + at, visible[:, None], other=0.0).to(tl.float32)
        acc = acc * rescale + tl.sum(weight[:, None] * v, 0)
        total = total * rescale + tl.sum(weight, 0)
        m = m_new
    tl.store(out_ptr + head * D + offs_d, acc / total)


def _attend_all(q: Tensor, kv: vp.KVCache) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, dim = q.shape
    k, v = repeated(kv.k, heads).contiguous(), repeated(kv.v, heads).contiguous()
    visible = visible_keys(kv)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    blocks = -(-kv.capacity // BLOCK)
    maxima = torch.empty(rows, heads, blocks, dtype=torch.float32, device=q.device)
    _dense_kernel[(rows * heads,)](
        q.contiguous(), k, v, visible.to(torch.int8), out, maxima, dim**-0.5, kv.capacity, heads,
        D=dim, BLOCK_N=BLOCK, num_warps=2,
    )  # fmt: skip
    return out.to(q.dtype), maxima, visible


def dense(q: Tensor, kv: vp.KVCache) -> Tensor:
    return _attend_all(q, kv)[0]


def anchor(
    q: Tensor, kv: vp.KVCache, visual: vp.VisualTokens, config: vp.PulseConfig
) -> tuple[Tensor, Blocks]:
    out, maxima, visible = _attend_all(q, kv)
    return out, select(maxima, visible, visual, config)


def follower(q: Tensor, kv: vp.KVCache, blocks: Blocks) -> Tensor:
    rows, heads, dim = q.shape
    k, v = repeated(kv.k, heads).contiguous(), repeated(kv.v, heads).contiguous()
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    counts = torch.tensor(blocks.counts, dtype=torch.int32, device=q.device)
    _follower_kernel[(rows * heads,)](
        q.contiguous(), k, v, visible_keys(kv).to(torch.int8), out, blocks.indices, counts,
        dim**-0.5, kv.capacity, heads, blocks.indices.shape[1],
        D=dim, BLOCK_N=BLOCK, num_warps=2,
    )  # fmt: skip
    return out.to(q.dtype)


def check() -> None:
    """Check both kernels against the plain form; under the interpreter this needs no GPU."""
    from visionpulse.testing import Case
    from visionpulse.testing.compare import Exact, assert_output

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = vp.PulseConfig(ratio=(0.3, 0.3))
    spans = (((10, 150), (160, 300)), ((64, 256),))
    problem = Case("block64", spans, size=330, lengths=(330, 270), starts=(0, 5)).build(
        torch.float32, device
    )
    q, kv = problem.q, problem.kv
    clean = vp.KVCache(kv.k.nan_to_num(), kv.v.nan_to_num(), kv.lengths, kv.starts)
    exact = Exact.of(problem)
    assert_output(dense(q, kv), exact, None)
    out, blocks = anchor(q, kv, problem.visual, config)
    assert_output(out, exact, None)
    _, plain = block64.anchor(q, clean, problem.visual, config)
    assert torch.equal(blocks.indices, plain.indices)
    torch.testing.assert_close(blocks.mass, plain.mass)
    torch.testing.assert_close(follower(q, kv, blocks), block64.follower(q, clean, plain))


if __name__ == "__main__":
    check()
    print("both kernels match the plain form")
