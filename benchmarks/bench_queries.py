"""Several queries of a row over one: dense attention, as a check of drafted tokens needs it.

    python benchmarks/bench_queries.py --shapes b1-32k --dtypes bf16,fp32 --out rows.jsonl

Every count of queries is timed in one interleaved run on cold layers, beside torch's attention with
the heads of a KV head grouped and the same queries.
"""

import argparse
from collections.abc import Callable

import torch
from baselines import PLAIN
from harness import Bench
from shapes import SHAPES, Layers, Shape
from torch import Tensor

import visionpulse as vp
from visionpulse.bench import cost
from visionpulse.cache import KVCache

COUNTS = (1, 2, 4, 8)


def grouped(q: Tensor, kv: KVCache) -> Tensor:
    """Torch's attention; q [B, Q, H, D], without the causal tail, whose mask would slow it."""
    folded = q.unflatten(2, (kv.kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    return torch.nn.functional.scaled_dot_product_attention(folded, kv.k, kv.v)


def ours(layers: Layers, q: Tensor, backend: str) -> Callable[[int], Tensor]:
    """Dense attention of all queries, the last checked against a call of its own."""
    common = {"workspace": vp.Workspace(), "backend": backend}

    def call(turn: int) -> Tensor:
        return vp.attend(q, layers.kv[turn % len(layers.kv)], **common)

    if q.dim() == 4:
        alone = vp.attend(q[:, -1].contiguous(), layers.kv[0], **common)
        several, share = call(0)[:, -1], 2e-2 if alone.dtype != torch.float32 else 1e-4
        largest = float(alone.abs().max())  # a number near zero is as exact as its neighbours
        torch.testing.assert_close(several, alone, rtol=share, atol=share * largest)
    return call


def torchs(layers: Layers, q: Tensor) -> Callable[[int], Tensor]:
    return lambda turn: grouped(q, layers.kv[turn % len(layers.kv)])


def run(bench: Bench, shape: Shape, dtype: torch.dtype) -> None:
    layers = Layers.make(shape, dtype, bench.device, 36, bench.options.budget << 20)
    size = (shape.rows, max(COUNTS), shape.heads, shape.head_dim)
    generator = torch.Generator(bench.device).manual_seed(1)
    drawn = torch.randn(size, generator=generator, device=bench.device).to(dtype)
    queries = {count: drawn[:, :count].contiguous() for count in COUNTS}
    variants = {}
    for backend in bench.backends(*layers.at(0), layers.visual):
        for count, q in queries.items():
            call = ours(layers, q if count > 1 else q[:, 0], backend)
            variants[f"{backend}:{count}-queries"] = call
    for count, q in queries.items():
        variants[f"{PLAIN}:{count}-queries"] = torchs(layers, q)
    variants = {name: bench.captured_layers(v, len(layers)) for name, v in variants.items()}
    times, ceilings = bench.time(variants, dtype, shape.head_dim * dtype.itemsize, layers)
    work = dict.fromkeys(variants, cost.dense(shape.cost(dtype)))
    bench.add(
        "queries", shape.name, dtype, {name: times[name] for name in variants}, ceilings,
        baseline=f"{PLAIN}:8-queries", work=work,
        facts={name: {"visual": shape.visual} for name in variants},
    )  # fmt: skip


def main() -> None:
    bench = Bench(
        argparse.ArgumentParser(description=__doc__.splitlines()[0]), shapes="b1-32k", dtypes="bf16"
    )
    for name in bench.options.shapes.split(","):
        for dtype in bench.dtypes:
            with bench.part(name):
                run(bench, SHAPES[name], dtype)
    bench.finish()


if __name__ == "__main__":
    main()
