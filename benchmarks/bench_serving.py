"""Against stock vLLM on the same CPU: the attention of a decode step, kernel against kernel.

    $(python tests/serving/environment.py) benchmarks/bench_serving.py --shapes b1-16k,b1-32k

Runs in the Python that has vLLM. Both read a paged cache of vLLM's block size; vLLM's holds its own
packed layout, ours plain rows, as in the engines. One layer of each kind is timed, cold, and
multiplied.
"""

import argparse
from collections import Counter
from collections.abc import Callable

import torch
from harness import Bench
from shapes import SHAPES, Shape

import visionpulse as vp
from visionpulse.bench.layers import LAST_CACHE
from visionpulse.bench.timing import Times
from visionpulse.schedule import Role, roles

BLOCK = 128
VLLM = "vllm:CPU_ATTN"
SCHEDULES = {
    "paper": {},
    "per_layer": {"schedule": "per_layer"},
    "lookback": {"schedule": "lookback"},
}


class PagedLayers:
    """Layers enough to be cold, each in vLLM's packed blocks and in ours."""

    def __init__(self, shape: Shape, dtype: torch.dtype, most: int, budget: int) -> None:
        from vllm import _custom_ops, envs
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.shape, self.ops = shape, _custom_ops
        self.isa = _get_attn_isa(dtype, BLOCK, shape.head_dim, "auto")
        self.blocks = -(-shape.keys // BLOCK)
        generator = torch.Generator().manual_seed(0)
        size = (shape.rows * self.blocks, shape.kv_heads, BLOCK, 2 * shape.head_dim)
        cold = -(-LAST_CACHE["cpu"] // shape.cache_bytes(dtype)) + 1
        count = max(2, min(most, cold, budget // (2 * shape.cache_bytes(dtype))))
        self.q = torch.randn(shape.rows, shape.heads, shape.head_dim, generator=generator).to(dtype)
        self.table = torch.arange(size[0], dtype=torch.int32).view(shape.rows, self.blocks)
        self.lengths = torch.full((shape.rows,), shape.keys, dtype=torch.int32)
        self.starts = torch.arange(shape.rows + 1, dtype=torch.int32)
        self.visual = vp.VisualTokens.from_spans([[(16, 16 + shape.visual)]] * shape.rows)
        self.ours = [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]
        self.theirs = [self._packed(one) for one in self.ours]
        self.metadata = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=shape.rows, num_heads=shape.heads, num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim, seq_lens=self.lengths, dtype=dtype,
            query_start_loc=self.starts, causal=True, sliding_window_size=-1, isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, dynamic_causal=None, kv_cache_dtype="auto",
        )  # fmt: skip

    def _packed(self, plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads, width = self.shape.kv_heads, self.shape.head_dim
        cache = torch.empty_like(plain).view(-1, heads, BLOCK * 2, width).chunk(2, dim=2)
        k, v = (
            half.permute(0, 2, 1, 3).reshape(-1, heads, width).contiguous()
            for half in plain.chunk(2, dim=3)
        )
        self.ops.cpu_attn_reshape_and_cache(
            k, v, *cache, torch.arange(len(k)), self.isa, k_scale=1.0, v_scale=1.0,
            kv_cache_dtype="auto",
        )  # fmt: skip
        return cache

    def vllm(self, turn: int, out: torch.Tensor) -> torch.Tensor:
        """A dense layer of stock vLLM."""
        k, v = self.theirs[turn % len(self.theirs)]
        self.ops.cpu_attention_with_kv_cache(
            query=self.q, key_cache=k, value_cache=v, output=out, query_start_loc=self.starts,
            seq_lens=self.lengths, scale=self.shape.head_dim**-0.5, causal=True, alibi_slopes=None,
            sliding_window=-1, block_table=self.table, softcap=0, scheduler_metadata=self.metadata,
            s_aux=None, dynamic_causal=None, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
        )  # fmt: skip
        return out

    def kv(self, turn: int) -> vp.PagedKVCache:
        """Our blocks of a layer."""
        halves = self.ours[turn % len(self.ours)].chunk(2, dim=3)
        return vp.PagedKVCache(*halves, self.table, self.lengths, layout="HND")


def kinds(layers: PagedLayers) -> dict[str, Callable[[int], object]]:
    """One layer of each kind, theirs and ours, checked against each other."""
    out, own = torch.empty_like(layers.q), torch.empty_like(layers.q)
    config, q, visual = layers.shape.config(), layers.q, layers.visual
    caches = [layers.kv(turn) for turn in range(len(layers.ours))]
    at = lambda turn: caches[turn % len(caches)]  # noqa: E731
    dense, theirs = vp.attend(q, at(0)), layers.vllm(0, out)
    bound = 1e-4 if q.dtype is torch.float32 else 1e-2
    torch.testing.assert_close(theirs, dense, rtol=bound, atol=bound)
    _, selection = vp.decode(q, at(0), visual, config)
    assert int(selection.counts.min()) == layers.shape.kept
    return {
        VLLM: lambda turn: layers.vllm(turn, out),
        "dense": lambda turn: vp.attend(q, at(turn), out=own),
        "anchor": lambda turn: vp.decode(q, at(turn), visual, config, out=own),
        "follower": lambda turn: vp.attend(q, at(turn), visual, selection, out=own),
    }


def composed(times: dict[str, Times], parts: dict[str, int]) -> Times:
    """A step of single layers: their times added, rounds of equal rank."""
    rounds = zip(*(times[name].seconds for name in parts), strict=True)
    return Times(tuple(sum(n * t for n, t in zip(parts.values(), r, strict=True)) for r in rounds))


def run(bench: Bench, shape: Shape, dtype: torch.dtype, count: int) -> None:
    layers = PagedLayers(shape, dtype, count, bench.options.budget << 20)
    times, ceilings = bench.time(kinds(layers), dtype, shape.head_dim * dtype.itemsize)
    made = {VLLM: {VLLM: count}, "cpu:dense": {"dense": count}}
    for name, changes in SCHEDULES.items():
        counts = Counter(roles(shape.config(**changes), (True,) * count, 1))
        of = {Role.DENSE: "dense", Role.ANCHOR: "anchor", Role.FOLLOWER: "follower"}
        made[f"cpu:{name}"] = {of[role]: n for role, n in counts.items()}
    facts = {
        name: {
            "layers": count, "distinct_layers": len(layers.ours), "visual": shape.visual,
            "retention": shape.retention, "block": BLOCK, "vllm_isa": layers.isa,
            "composed": " + ".join(f"{n} x {part}" for part, n in parts.items()),
        }
        for name, parts in made.items()
    }  # fmt: skip
    whole = {name: composed(times, parts) for name, parts in made.items()}
    bench.add("serving", shape.name, dtype, whole, ceilings, baseline=VLLM, facts=facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36)
    bench = Bench(parser, shapes="b1-16k,b1-32k", dtypes="bf16")
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()  # else the first AMX instruction outside a worker of vLLM is SIGILL
    for shape in bench.options.shapes.split(","):
        for dtype in bench.dtypes:
            with bench.part(shape):
                run(bench, SHAPES[shape], dtype, bench.options.layers)
    bench.finish()


if __name__ == "__main__":
    main()
