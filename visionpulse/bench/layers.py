"""Random inputs of so many layers that no layer is still in a cache when its turn comes."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..config import PulseConfig
from ..float8 import LARGEST, stored
from ..visual import VisualTokens
from .cost import OpShape, stored_itemsize

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
    cache: str = "model"  # as in PulseConfig

    @property
    def keys(self) -> int:
        """Keys of a row."""
        return self.text + self.visual

    @property
    def kept(self) -> int:
        """Visual tokens that `config` keeps."""
        return max(1, int(self.retention * self.visual))

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """K and V of one layer."""
        return self.cost(dtype).cache_bytes

    def cost(self, dtype: torch.dtype) -> OpShape:
        """The same problem for the cost model."""
        sizes = self.rows, self.heads, self.kv_heads, self.head_dim, self.text, self.visual
        return OpShape(*sizes, dtype.itemsize, stored_itemsize(self.config()))

    def config(self, **changes: Any) -> PulseConfig:
        """Keep exactly `retention` of the visual tokens, whatever the mass of random keys."""
        ratio = (self.retention, self.retention)
        return PulseConfig(**{"ratio": ratio, "cache": self.cache} | changes)


@dataclass
class Layers:
    """Tensors of as many layers as a run needs to stay cold."""

    shape: Shape
    q: list[Tensor]  # [B, H, D] each
    kv: list[KVCache]  # [B, G, N, D] each, as the shape's cache stores them
    visual: VisualTokens
    wide: list[KVCache]  # the same numbers in the dtype of q, for whom reads no 8 bits

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
        held = (
            each
            if shape.cache == "model"
            else each + replace(shape, cache="model").cache_bytes(dtype)
        )
        count = max(2, min(layers, max(cold, budget // held)))
        size = (shape.rows, shape.kv_heads, shape.keys, shape.head_dim)

        def random(*dims: int) -> Tensor:
            return torch.randn(dims, generator=generator, device=device).to(dtype)

        wide = [KVCache(random(*size), random(*size)) for _ in range(count)]
        kv = wide if shape.cache == "model" else [in_8_bits(one) for one in wide]
        q = [random(shape.rows, shape.heads, shape.head_dim) for _ in range(count)]
        begin = shape.text // 4  # a system prompt before the picture, the question after it
        spans = [[(begin, begin + shape.visual)]] * shape.rows
        return cls(shape, q, kv, VisualTokens.from_spans(spans, device=device), wide)

    def __len__(self) -> int:
        return len(self.kv)

    def at(self, turn: int) -> tuple[Tensor, KVCache]:
        """The inputs of one turn."""
        return self.q[turn % len(self.q)], self.kv[turn % len(self.kv)]

    def in_one_dtype(self) -> "Layers":
        """The same layers with the cache in the dtype of q: themselves where it is."""
        if self.wide is self.kv:
            return self
        return replace(self, shape=replace(self.shape, cache="model"), kv=self.wide)

    def wide_at(self, turn: int) -> tuple[Tensor, KVCache]:
        """The inputs of one turn in one dtype."""
        return self.q[turn % len(self.q)], self.wide[turn % len(self.wide)]

    def memory(self, turn: int) -> list[Tensor]:
        """What a layer may read in one turn."""
        (q, kv), (_, wide) = self.at(turn), self.wide_at(turn)
        return [q, kv.k, kv.v] if wide is kv else [q, kv.k, kv.v, wide.k, wide.v]


def in_8_bits(kv: KVCache) -> KVCache:
    """The same numbers as `cache="fp8"` stores them, with a scale for each KV head."""
    k_scale, v_scale = ((x.abs().amax((0, 2, 3)).float() / LARGEST) for x in (kv.k, kv.v))
    k, v = stored(kv.k, k_scale), stored(kv.v, v_scale)
    return KVCache(k, v, k_scale=k_scale, v_scale=v_scale)
