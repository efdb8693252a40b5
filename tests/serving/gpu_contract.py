"""What the GPU classes take for granted of vLLM, as far as a CPU can import it.

Run by the Python that has vLLM; fails with the first name or argument that is another.
"""

import inspect
from dataclasses import fields

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn, triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from visionpulse.serving.rows import Requests
from visionpulse.serving.vllm import compat, cuda, facts

FORWARD = [
    "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output",
    "output_scale", "output_block_scale",
]  # fmt: skip
SIGNATURES = {
    flash_attn.FlashAttentionImpl.forward: FORWARD,
    triton_attn.TritonAttentionImpl.forward: FORWARD,
    flash_attn.FlashAttentionMetadataBuilder.build: [
        "self", "common_prefix_len", "common_attn_metadata", "fast_build"
    ],
    triton_attn.TritonAttentionMetadataBuilder.build: [
        "self", "common_prefix_len", "common_attn_metadata", "fast_build"
    ],
    flash_attn.FlashAttentionMetadataBuilder.build_for_cudagraph_capture: [
        "self", "common_attn_metadata"
    ],
    triton_attn.TritonAttentionMetadataBuilder.build_for_cudagraph_capture: [
        "self", "common_attn_metadata"
    ],
    ModelState.remove_request: ["self", "req_id"],
    DefaultModelState.add_request: ["self", "req_index", "new_req_data"],
    EncoderCache.add_request: ["self", "req_id", "mm_features"],
}  # fmt: skip
COMMON = {
    "num_reqs", "num_actual_tokens", "max_query_len", "query_start_loc", "query_start_loc_cpu",
    "seq_lens", "seq_lens_cpu_upper_bound", "block_table_tensor", "slot_mapping", "is_prefilling",
}  # fmt: skip


def check():
    for function, wanted in SIGNATURES.items():
        found = list(inspect.signature(function).parameters)
        assert found == wanted, f"{function.__qualname__}{found}, expected {wanted}"
    assert {field.name for field in fields(CommonAttentionMetadata)} >= COMMON
    assert callable(CommonAttentionMetadata.replace)
    assert callable(GPUModelRunner._build_attention_metadata)
    # the first argument behind self is the batch, whose rows are named
    assert list(inspect.signature(DefaultModelState.prepare_attn).parameters)[1] == "input_batch"
    assert AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value < AttentionCGSupport.ALWAYS.value
    for name, ours in facts.GPU_BACKENDS.items():
        own, theirs = getattr(cuda, ours), AttentionBackendEnum[name].get_class()
        assert issubclass(own, theirs) and own.get_name() == theirs.get_name() == name
        builder = own.get_builder_cls()
        assert issubclass(builder, theirs.get_builder_cls())
        assert not theirs.get_builder_cls().requires_block_table_width
        # without a config at hand an engine gets what vLLM has
        assert own.get_impl_cls() is theirs.get_impl_cls()
        assert theirs.forward_includes_kv_cache_update is False
    compat._watch_second_runner(lambda name, features, params: None, Requests())
    for name in ("add_request", "remove_request", "prepare_attn"):
        assert hasattr(getattr(DefaultModelState, name), "visionpulse"), name


if __name__ == "__main__":
    check()
    print("holds")
