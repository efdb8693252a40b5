"""Ours over SGLang's torch backend, pools and batch on a CPU; what it needs of Triton's.

Run by a Python that can import SGLang; fails with the first name or number that differs.
"""

import inspect
import os
from dataclasses import fields
from importlib import import_module, metadata
from types import SimpleNamespace

import torch

os.environ["VISIONPULSE_SERVING"] = '{"ratio": [1.0, 1.0], "anchor": 1}'

from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention import triton_backend
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.multimodal.modality import Modality
from sglang.srt.plugins.hook_registry import HookRegistry

from visionpulse.serving import sglang

LAYERS, HEADS, KV_HEADS, DIM, LONGEST = 3, 8, 2, 64, 96
ARGUMENTS = {
    "init_forward_metadata": ["self", "forward_batch"],
    "init_forward_metadata_out_graph": ["self", "forward_batch", "in_capture"],
    "init_cuda_graph_state": ["self", "max_bs", "max_num_tokens"],
    "forward_decode": ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"],
}
BATCH = {
    "batch_size", "forward_mode", "req_pool_indices", "seq_lens", "rids", "mm_inputs",
    "out_cache_loc",
}  # fmt: skip


def names() -> None:
    """What is overridden, hooked and read is there."""
    for backend in (triton_backend.TritonAttnBackend, TorchNativeAttnBackend):
        for name, wanted in ARGUMENTS.items():
            found = list(inspect.signature(getattr(backend, name)).parameters)
            assert found[: len(wanted)] == wanted, (backend, name, found)
        # else a step would begin twice
        assert "init_forward_metadata" in vars(backend)
        source = inspect.getsource(backend.__init__)
        assert "self.req_to_token_pool =" in source and "self.token_to_kv_pool =" in source
    assert {field.name for field in fields(ForwardBatch)} >= BATCH
    assert ForwardMode.DECODE.is_decode() and not ForwardMode.EXTEND.is_decode()
    assert {mode.name for mode in Modality} >= set(sglang.VISUAL)
    source = inspect.getsource(ModelRunner)
    for name in ("is_draft_worker", "model_config", "req_to_token_pool", "token_to_kv_pool",
                 "kv_cache_dtype", "device"):  # fmt: skip
        assert f"self.{name}" in source, name


def plugin() -> None:
    """The entry point names a backend more, and graphs are replayed with pictures."""
    (entry,) = (
        one
        for one in metadata.entry_points(group="sglang.srt.plugins")
        if one.name == "visionpulse"
    )
    entry.load()()
    HookRegistry.apply_hooks()
    assert sglang.NAME in ATTENTION_BACKEND_CHOICES
    assert ATTENTION_BACKENDS[sglang.NAME] is sglang.backend_of
    module, _, name = sglang.REPLAY_VIEW.rpartition(".")
    replay = getattr(import_module(module), name)
    assert "forward_batch" in inspect.signature(replay).parameters
    assert inspect.unwrap(replay) is not replay, "not hooked"


def step() -> None:
    """One decode step that keeps all says what SGLang's torch backend says."""
    torch.manual_seed(0)
    requests = ReqToTokenPool(4, LONGEST, "cpu", False)
    pool = MHATokenToKVPool(4 * LONGEST, 1, torch.float32, KV_HEADS, DIM, LAYERS, "cpu", False)
    slots = torch.randperm(4 * LONGEST).view(4, LONGEST)
    requests.req_to_token[1:5] = slots.int()
    for layer in range(LAYERS):
        pool.get_key_buffer(layer).normal_()
        pool.get_value_buffer(layer).normal_()
    text = SimpleNamespace(num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    runner = SimpleNamespace(
        device="cpu", is_draft_worker=False, req_to_token_pool=requests, token_to_kv_pool=pool,
        kv_cache_dtype=torch.float32,
        model_config=SimpleNamespace(hf_text_config=text, is_multimodal=True),
    )  # fmt: skip
    facts = sglang.Engine(full=(True,) * LAYERS, heads=HEADS)
    sglang.engine_of = lambda runner: facts  # a server's context is not up
    ours, theirs = sglang.backend_of(runner), TorchNativeAttnBackend(runner)
    assert isinstance(ours, TorchNativeAttnBackend)
    picture = MultimodalDataItem(modality=Modality.IMAGE, offsets=[(3, 40)])
    lengths = torch.tensor([50, 30, 96])
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE, batch_size=3, input_ids=torch.zeros(3, dtype=torch.long),
        req_pool_indices=torch.tensor([2, 1, 4]), seq_lens=lengths, seq_lens_cpu=lengths,
        out_cache_loc=slots[[1, 0, 3], lengths - 1], seq_lens_sum=int(lengths.sum()),
        mm_inputs=[MultimodalInputs(mm_items=[picture]), None,
                   MultimodalInputs(mm_items=[picture])],
        rids=["a", "b", "c"],
    )  # fmt: skip
    for number in range(LAYERS):
        layer = RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, number)
        q, k, v = torch.randn(3, HEADS * DIM), *torch.randn(2, 3, KV_HEADS, DIM)
        outs = []
        for backend in (ours, theirs):
            if number == 0:
                backend.init_forward_metadata(batch)
            outs.append(backend.forward_decode(q, k, v, layer, batch))
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    assert ours.step.buffers.selection.counts[:3].tolist() == [38, 0, 38]


if __name__ == "__main__":
    assert metadata.version("sglang") == "0.5.23"
    names()
    plugin()
    step()
    print("holds")
