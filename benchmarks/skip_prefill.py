"""Where a worker of vLLM imports this, prefill writes keys and values but attends to nothing.

    vllm serve ... --worker-extension-cls skip_prefill.Extension

Prefill of 16k tokens on one thread takes minutes, in an engine of ours and in stock vLLM alike, and
decode steps are what benchmarks time. Both skip it.
"""

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from visionpulse.serving.vllm.cpu import PulseImpl

DECODE = 16  # tokens of the largest decode step; a step of more has prefill in it


class Extension:
    """Adds nothing to the worker."""


def skipping(forward):
    def made(self, layer, query, key, value, kv_cache, attn_metadata, output, **more):
        if attn_metadata is not None and len(query) > DECODE:
            return output.zero_()
        return forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **more)

    return made


for implementation in (CPUAttentionBackendImpl, PulseImpl):
    implementation.forward = skipping(implementation.forward)
