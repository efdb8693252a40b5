"""vLLM's own CPU attention as a decode layer, where vLLM is installed: the strongest peer.

Its cache keeps keys in tiles of its own; a contiguous cache is copied into one once, outside.
"""

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache

PAGE = 128  # tokens, as vLLM's CPU worker uses


def missing() -> str | None:
    """Why it cannot run here, or None."""
    if find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        importlib.import_module("vllm._custom_ops")
        _isa(torch.float32)
    except Exception as error:  # another version of vLLM, or one for GPUs
        return f"this vLLM has no CPU attention that is known here ({type(error).__name__})"
    return None


def _isa(dtype: torch.dtype, head_dim: int = 128) -> str:
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    platform.import_kernels()
    backend: Any = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    return str(backend._get_attn_isa(dtype, PAGE, head_dim, "auto"))


class VllmForm:
    """Dense decode attention by vLLM's kernel; q [B, H, D], a contiguous cache of whole pages."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[KVCache, Tensor, dict[str, Any]]] = {}

    def memory(self, kv: KVCache) -> list[Tensor]:
        """The copy that its calls read."""
        return [self._made[id(kv)][1]] if id(kv) in self._made else []

    def __call__(self, q: Tensor, kv: KVCache) -> Tensor:
        """Attention over all keys."""
        if id(kv) not in self._made:
            self._made[id(kv)] = self._copy(q, kv)
        out = torch.empty_like(q)
        ops: Any = importlib.import_module("vllm._custom_ops")
        ops.cpu_attention_with_kv_cache(query=q, output=out, **self._made[id(kv)][2])
        return out

    def _copy(self, q: Tensor, kv: KVCache) -> tuple[KVCache, Tensor, dict[str, Any]]:
        ops: Any = importlib.import_module("vllm._custom_ops")
        envs: Any = importlib.import_module("vllm.envs")
        rows, groups, keys, dim = kv.k.shape
        if keys % PAGE or kv.lengths is not None or kv.starts is not None:
            raise ValueError(f"takes whole pages of {PAGE} keys in every row, got {keys}")
        isa, pages = _isa(q.dtype, dim), keys // PAGE
        both = torch.empty(rows * pages, groups, PAGE, 2 * dim, dtype=q.dtype)
        k_pages, v_pages = both.view(-1, groups, PAGE * 2, dim).chunk(2, dim=2)
        for b in range(rows):
            k, v = (t[b].transpose(0, 1).contiguous() for t in (kv.k, kv.v))  # [N, G, D]
            slots = torch.arange(b * keys, (b + 1) * keys)
            ops.cpu_attn_reshape_and_cache(
                k, v, k_pages, v_pages, slots, isa,
                k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
            )  # fmt: skip
        lengths = torch.full((rows,), keys, dtype=torch.int32)
        starts = torch.arange(rows + 1, dtype=torch.int32)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=rows, num_heads=q.shape[1], num_kv_heads=groups, head_dim=dim,
            seq_lens=lengths, dtype=q.dtype, query_start_loc=starts, causal=True,
            sliding_window_size=-1, isa=isa, enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None, kv_cache_dtype="auto",
        )  # fmt: skip
        fixed = {
            "key_cache": k_pages, "value_cache": v_pages, "query_start_loc": starts,
            "seq_lens": lengths, "scale": dim**-0.5, "causal": True, "alibi_slopes": None,
            "sliding_window": -1, "softcap": 0, "scheduler_metadata": metadata, "s_aux": None,
            "block_table": torch.arange(rows * pages, dtype=torch.int32).view(rows, pages),
            "dynamic_causal": None, "k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto",
        }  # fmt: skip
        return kv, both, fixed
