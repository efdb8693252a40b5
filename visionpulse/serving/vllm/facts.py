"""vLLM's config as the facts that decide what can be served. Imports no vllm: fakes will do."""

from collections.abc import Callable, Iterable
from typing import Any

from ...backends import get as backend_of
from ..setting import KEY, Engine, Obstacle, asked_of

DRAFTS = {
    "cpu": "each drafted token is a decode row of its own, sparse like the others",
    "cuda": "each drafted token is a decode row of its own, sparse like the others, as long as the "
    "rows of a step have as many tokens each; those behind the first that differs stay dense",
}
UNQUANTISED = ("auto", "float32", "bfloat16", "float16", "half", "float")
FLOAT8 = ("fp8", "fp8_e4m3")  # a scale for all numbers of a layer, or for each head
KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # our backends on each device
# Config fields of language models whose logits have a bias that the kernels do not add.
ALIBI = ("alibi", "use_alibi", "alibi_bias_max")
# vLLM's attention backends of a GPU that ours stand over, and our classes in `cuda.py`.
GPU_BACKENDS = {"FLASH_ATTN": "PulseFlashBackend", "TRITON_ATTN": "PulseTritonBackend"}
SINKS = ("gpt_oss", "mimo_v2", "mimo_v2_flash", "openai_privacy_filter")  # model types


def asked(vllm_config: Any) -> dict[str, Any] | None:
    """What `--additional-config`, or else the environment, asks for."""
    given = vllm_config.additional_config
    return asked_of(given.get(KEY) if isinstance(given, dict) else None)


def engine_of(vllm_config: Any, device: str, stage_of: Callable[..., Any]) -> Engine:
    """The facts; `stage_of(layers, rank, ranks)` gives the layers of a pipeline stage."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    layers = text.num_hidden_layers
    types = getattr(text, "layer_types", None)
    ranks = parallel.pipeline_parallel_size
    return Engine(
        full=tuple(t == "full_attention" for t in types) if types else (True,) * layers,
        heads=text.num_attention_heads,
        stages=tuple(stage_of(layers, rank, ranks) for rank in range(ranks)),
        tensor_ranks=parallel.tensor_parallel_size,
        device=device,
        has_graphs=device != "cpu" and not model.enforce_eager,
        has_drafts=getattr(vllm_config, "speculative_config", None) is not None,
        obstacles=tuple(_obstacles(vllm_config, device)),
    )


def widened(vllm_config: Any) -> int:
    """How many times larger the model's numbers are than those of its KV cache."""
    is_float8 = str(vllm_config.cache_config.cache_dtype) in FLOAT8
    return int(vllm_config.model_config.dtype.itemsize) if is_float8 else 1


def _reads_float8(device: str) -> bool:
    return any(backend_of(name).reads_float8 for name in KERNELS.get(device, ()))


def _obstacles(vllm_config: Any, device: str) -> Iterable[Obstacle]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, text = vllm_config.cache_config, model.hf_text_config
    if not model.is_multimodal_model:
        yield Obstacle(
            f"{model.model} takes no pictures, so there is nothing to prune",
            "serve a vision-language model",
        )
    if str(cache.cache_dtype) not in UNQUANTISED + FLOAT8:
        yield Obstacle(
            f"--kv-cache-dtype {cache.cache_dtype}: the kernels read keys of 32 and 16 bits, and "
            "of 8 as e4m3",
            "leave the flag out, or set --kv-cache-dtype fp8",
        )
    elif str(cache.cache_dtype) in FLOAT8 and not _reads_float8(device):
        yield Obstacle(
            f"--kv-cache-dtype {cache.cache_dtype}: no kernel of ours reads keys of 8 bits on a "
            f"{device} yet",
            "leave the flag out",
        )
    if model.use_mla:
        yield Obstacle(
            "multi-head latent attention: a head has no keys of its own to score",
            "serve a model with grouped-query attention",
        )
    if any(getattr(text, name, None) for name in ALIBI):
        yield Obstacle("ALiBi: the kernels add no position bias", "serve a model with RoPE")
    if getattr(text, "model_type", None) in SINKS:
        yield Obstacle("attention sinks: the kernels have none", "serve a model without sinks")
    if device != "cpu":
        yield from _on_a_gpu(vllm_config, device)
    if device == "cpu" and vllm_config.kv_transfer_config is not None:
        yield Obstacle(
            "--kv-transfer-config: on the CPU our blocks hold plain rows, other engines' do not",
            "leave the flag out",
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        flag = f"--{name.replace('_', '-')}"
        if (ranks := getattr(parallel, name, 1)) > 1:
            yield Obstacle(f"{flag} {ranks}: no rank sees all keys of a row", f"set {flag} 1")
    if device == "cpu" and parallel.pipeline_parallel_size > 1 and model.enforce_eager:
        yield Obstacle(
            "--pipeline-parallel-size with --enforce-eager: vLLM's CPU engine makes what stages "
            "receive into only when it compiles, so its later stages fail, ours or not",
            "leave out --enforce-eager, or split with --tensor-parallel-size",
        )
    if device == "cpu" and "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        yield Obstacle("chunked attention: our blocks hold plain rows", "serve another model")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        yield Obstacle(
            "--kv-sharing-fast-prefill: layers share keys past their own attention",
            "leave the flag out",
        )


def _on_a_gpu(vllm_config: Any, device: str) -> Iterable[Obstacle]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if device != "cuda":
        yield Obstacle(f"a device {device}", "serve on a CPU or on an NVIDIA GPU")
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    if backend is not None and backend.name not in GPU_BACKENDS:
        yield Obstacle(
            f"--attention-backend {backend.name}: decode rows are ours over "
            f"{' and '.join(GPU_BACKENDS)}",
            f"set --attention-backend {next(iter(GPU_BACKENDS))}",
        )
    if getattr(parallel, "use_ubatching", False):
        yield Obstacle("--enable-dbo: half a batch has not the rows of a step", "leave it out")
    if getattr(model, "is_mm_prefix_lm", False):
        yield Obstacle(
            "pictures whose tokens see each other both ways: a batch in two parts loses which",
            "serve a model with causal attention",
        )
    if getattr(model, "rswa_window", None) is not None:
        yield Obstacle("reference sliding windows: the kernels have none", "serve another model")
