"""The GPU classes in real engines of a CPU: python gpu_engine.py SPEC, as engine.py.

Builder, layers and step are those of a GPU. Below them vLLM's Triton kernels, which need one, are
replaced by a few lines of torch over the same blocks, K in the first half and V in the second.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import engine
import torch
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from visionpulse.float8 import FLOAT8, read, stored
from visionpulse.serving.vllm import cuda

CALLS = {"theirs": 0}


class TorchImpl(triton_attn.TritonAttentionImpl):
    """What vLLM's kernels compute."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        n, size = len(slot_mapping), kv_cache.shape[2]
        block, offset = slot_mapping // size, slot_mapping % size
        if kv_cache.element_size() == 1:
            key, value = stored(key, layer._k_scale), stored(value, layer._v_scale)
            key, value = key.view(kv_cache.dtype), value.view(kv_cache.dtype)
        kv_cache[block, :, offset, : self.head_size] = key[:n]
        kv_cache[block, :, offset, self.head_size :] = value[:n]

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        if attn_metadata is None:
            return output.fill_(0)
        assert scales in ((), (None, None))  # of an output in 8 bits
        CALLS["theirs"] += 1
        starts, size = attn_metadata.query_start_loc.tolist(), kv_cache.shape[2]
        group = self.num_heads // self.num_kv_heads
        for row, length in enumerate(attn_metadata.seq_lens.tolist()):
            begin, end = starts[row : row + 2]
            blocks = attn_metadata.block_table[row, : -(-length // size)].long()
            cached = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]  # [G, length, 2D]
            halves = cached.chunk(2, dim=2)
            if cached.element_size() == 1:
                both = zip(halves, (layer._k_scale, layer._v_scale), strict=True)
                halves = (read(half.view(FLOAT8), scale) for half, scale in both)
            k, v = (t.repeat_interleave(group, 0) for t in halves)
            seen = torch.ones(end - begin, length, dtype=torch.bool).tril(length - (end - begin))
            z = (query[begin:end].transpose(0, 1) @ k.transpose(1, 2)) * self.scale
            p = z.masked_fill(~seen, -torch.inf).softmax(-1)
            output[begin:end] = (p @ v).transpose(0, 1)
        return output


class TestImpl(cuda.Impl, TorchImpl):
    """Ours over it."""


class TestBackend(cuda.PulseTritonBackend):
    """Stands where CPU_ATTN stood."""

    @staticmethod
    def get_name():
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls():
        return TestImpl


if __name__ == "__main__":
    load_general_plugins()  # once a process: what it registers is then replaced
    register_backend(AttentionBackendEnum.CPU_ATTN, "__main__.TestBackend")
    engine.main(json.loads(sys.argv[1]))
    assert CALLS["theirs"] > 0
