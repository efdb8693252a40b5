"""The shapes that benchmarks run, by name, and their tensors: random, and rotated to stay cold."""

from dataclasses import dataclass

import torch
from torch import Tensor

import visionpulse as vp
from visionpulse.analysis import cost

LAST_CACHE = {"cpu": 64 << 20, "cuda": 128 << 20}  # bytes, above any of today's


@dataclass(frozen=True)
class Shape:
    """One layer's decode problem; heads and head dim of the published models by default."""

    name: str
    rows: int
    visual: int
    text: int = 256
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    retention: float = 0.05

    @property
    def keys(self) -> int:
        return self.text + self.visual

    @property
    def kept(self) -> int:
        return max(1, int(self.retention * self.visual))

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """K and V of one layer."""
        return 2 * self.rows * self.kv_heads * self.keys * self.head_dim * dtype.itemsize

    def cost(self, dtype: torch.dtype) -> cost.Shape:
        return cost.Shape(
            self.rows, self.heads, self.kv_heads, self.head_dim, self.text, self.visual,
            dtype.itemsize,
        )  # fmt: skip

    def config(self, **changes: object) -> vp.PulseConfig:
        """Exactly `retention` of the visual tokens, whatever the mass of random keys."""
        return vp.PulseConfig(ratio=(self.retention, self.retention), **changes)


def _published() -> list[Shape]:
    contexts = {"1k": 1024, "4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "128k": 131072}
    return [
        Shape(f"b{rows}-{name}", rows, visual)
        for rows in (1, 2, 4, 8, 16, 32)
        for name, visual in contexts.items()
    ]


SHAPES = {shape.name: shape for shape in _published()}


@dataclass
class Layers:
    """Inputs of several layers: so many that none is found in a cache when its turn comes."""

    shape: Shape
    q: list[Tensor]  # [B, H, D] each
    kv: list[vp.KVCache]  # [B, G, N, D] each
    visual: vp.VisualTokens

    @classmethod
    def make(
        cls,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layers: int = 36,
        budget: int = 1 << 30,
        seed: int = 0,
    ) -> "Layers":
        """As many distinct layers as fit in `budget` bytes, at most `layers`, at least two."""
        generator = torch.Generator(device).manual_seed(seed)
        each = shape.cache_bytes(dtype)
        cold = 1 + -(-2 * LAST_CACHE[torch.device(device).type] // each)
        count = max(2, min(layers, max(cold, budget // each)))
        size = (shape.rows, shape.kv_heads, shape.keys, shape.head_dim)

        def random(*dims: int) -> Tensor:
            return torch.randn(dims, generator=generator, device=device).to(dtype)

        kv = [vp.KVCache(random(*size), random(*size)) for _ in range(count)]
        q = [random(shape.rows, shape.heads, shape.head_dim) for _ in range(count)]
        begin = shape.text // 4  # a system prompt before the picture, the question after it
        spans = [[(begin, begin + shape.visual)]] * shape.rows
        return cls(shape, q, kv, vp.VisualTokens.from_spans(spans, device=device))

    def __len__(self) -> int:
        return len(self.kv)

    def at(self, turn: int) -> tuple[Tensor, vp.KVCache]:
        """The inputs of one turn."""
        return self.q[turn % len(self.q)], self.kv[turn % len(self.kv)]
