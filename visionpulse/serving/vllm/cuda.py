"""vLLM's GPU attention with our anchors and followers.

Keys and values lie as vLLM's FlashAttention and Triton backends store them, and are read in place.
Layers before the anchor, prefill and everything else stay on vLLM's own path: a layer of ours runs
the decode rows at the front of a batch, as long as they have as many tokens each (one, and those
drafted), and hands the others on. A full CUDA graph holds such rows alone, so it is all ours from
the anchor on.
"""

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn, triton_attn

from ...float8 import FLOAT8
from ...schedule import Role
from ..graphs import GraphLayer, GraphStep, GraphSteps, leading
from ..rows import RequestRow
from ..setting import Setting
from ..step import UNSCALED
from . import compat
from .metrics import publish

SPARSE = (Role.ANCHOR, Role.FOLLOWER)


class Shared:
    """What the builders and layers of one engine share: the selection crosses them in it."""

    def __init__(self, vllm_config: Any, device: Any) -> None:
        setting = compat.setting(vllm_config)
        assert setting is not None
        self.vllm_config, self.setting = vllm_config, setting
        self.steps = GraphSteps(
            setting,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
            device,
            max_queries=_most_queries(vllm_config),
        )
        self.counts_steps: Any = None  # the builder that does
        self.is_reserved = False
        compat.watch_runner()

    def role(self, name: str) -> Role:
        """What a layer does."""
        return role_of(self.setting, name)


def role_of(setting: Setting, name: str) -> Role:
    """What a layer does; one beyond the model's is a drafter's."""
    number = compat.layer_number(name)
    return setting.roles[number] if number < len(setting.roles) else Role.MODEL


_engines: list[Shared] = []  # of this process; in tests several, one after the other


def engine_of(vllm_config: Any, device: Any) -> Shared:
    """What is shared in an engine."""
    for engine in _engines:
        if engine.vllm_config is vllm_config:
            return engine
    _engines[:] = [Shared(vllm_config, device)]
    return _engines[0]


class Ours:
    """What the builder adds to vLLM's metadata of a step."""

    def __init__(self, engine: Shared, step: GraphStep, rest: Any, begin: int) -> None:
        self.engine, self.step = engine, step
        self.rest = rest  # vLLM's metadata of the rows behind ours; None where there are none
        self.begin = begin  # their first query token


def _most_queries(vllm_config: Any) -> int:
    """Tokens of a decode row: one, and those drafted."""
    return 1 + int(getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0)


def _is_asked(vllm_config: Any) -> bool:
    return vllm_config is not None and compat.setting(vllm_config) is not None


class Builder:
    """Splits a step into decode rows, which are ours from the anchor on, and the rest."""

    supports_update_block_table = False  # a copy would carry the step of another table
    own: Any  # vLLM's builder

    def __new__(
        cls, spec: Any, names: list[str], vllm_config: Any, device: Any, **more: Any
    ) -> Any:
        """Give vLLM's own builder to an engine that did not ask for us."""
        if not _is_asked(vllm_config):
            return cls.own(spec, names, vllm_config, device, **more)
        return super().__new__(cls)

    def __init__(
        self, spec: Any, names: list[str], vllm_config: Any, device: Any, **more: Any
    ) -> None:
        super().__init__(spec, names, vllm_config, device, **more)  # type: ignore[call-arg]
        self.most_queries = _most_queries(vllm_config)
        self.reorder_batch_threshold = self.most_queries  # vLLM puts rows of so few tokens first
        self.engine = engine_of(vllm_config, device)
        self.is_sparse = any(self.engine.role(name) in SPARSE for name in names)
        if self.is_sparse and self.engine.counts_steps is None:
            self.engine.counts_steps = self
            publish(vllm_config, self.engine.setting, self.engine.steps.counters)
        self._captures = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Full graphs of decode rows alone: what runs on the host is no part of them."""
        own = cls.own.get_cudagraph_support(vllm_config, kv_cache_spec)
        if not _is_asked(vllm_config):
            return own
        ours = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        if _most_queries(vllm_config) > 1:
            ours = AttentionCGSupport.UNIFORM_BATCH
        return min(own, ours, key=lambda support: support.value)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """The metadata that a graph is captured with: empty rows, the grid of all K_max."""
        self._captures = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._captures = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **more: Any,
    ) -> Any:
        """vLLM's metadata of one step, with what is ours of it."""  # noqa: D403
        common = common_attn_metadata
        made = super().build(common_prefix_len, common, fast_build, **more)  # type: ignore[misc]
        made.visionpulse = self._ours(common) if self.is_sparse else None
        return made

    def _ours(self, common: CommonAttentionMetadata) -> Ours | None:
        known = [] if self._captures else compat.current_rows() or []
        count, queries = _leading(common, self.most_queries)
        if not count:
            return None
        step = self.engine.steps.make(
            _decoding(known, common), count, common.block_table_tensor, common.seq_lens,
            queries=queries, counts=self.engine.counts_steps is self,
        )  # fmt: skip
        if step is None:
            return None
        begin = count * queries
        if count == common.num_reqs:
            return Ours(self.engine, step, None, begin)
        # without a schedule made ahead: that one lies in a buffer which the whole step reads
        rest = super().build(0, _rest(common, count, begin), True)  # type: ignore[misc]
        return Ours(self.engine, step, rest, begin)


def _leading(common: CommonAttentionMetadata, most: int) -> tuple[int, int]:
    """The rows at the front of a batch that are ours, and the tokens of each."""
    if common.max_query_len == 1:
        return int(common.num_reqs), 1
    return leading(common.query_start_loc_cpu.diff().tolist(), most)


def _decoding(known: list[RequestRow], common: CommonAttentionMetadata) -> list[RequestRow | None]:
    """The known rows, None where one token is the last of a prefill, which is dense."""
    if common.is_prefilling is None:
        return list(known)
    prefills = common.is_prefilling.tolist()
    return [None if is_prefill else row for row, is_prefill in zip(known, prefills, strict=False)]


def _rest(common: CommonAttentionMetadata, first: int, begin: int) -> Any:
    """The rows from `first` on, their tokens from `begin` on, as a batch of their own."""
    bound = common.seq_lens_cpu_upper_bound
    return common.replace(
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - begin,
        query_start_loc=common.query_start_loc[first:] - begin,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - begin,
        seq_lens=common.seq_lens[first:],
        seq_lens_cpu_upper_bound=None if bound is None else bound[first:],
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[begin:],
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[first:],
    )


class Impl:
    """One layer: ours on rows of one token at an anchor and its followers, else vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compat.refuse_layer(self)
        self.vllm_config = get_current_vllm_config_or_none()
        self.ours: GraphLayer | None = None
        self.is_sparse: bool | None = None  # known with the first step
        self.pages: tuple[Tensor, Tensor] | None = None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: the kernels write the dtype of the query."""
        return False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend as the layer's role says."""
        ours: Ours | None = getattr(attn_metadata, "visionpulse", None)
        scales = (output_scale, output_block_scale)
        theirs: Any = super().forward  # type: ignore[misc]
        if attn_metadata is None:
            self._reserve(layer, query, output)
        if ours is None or not self._begin(layer, kv_cache, ours.engine):
            made: Tensor = theirs(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales
            )
            return made
        assert self.ours is not None and self.pages is not None
        n, q, kv_scales = ours.begin, query[: ours.begin], UNSCALED
        if kv_cache.element_size() == 1:
            kv_scales = (layer._k_scale, layer._v_scale)
            q = _wide(q, output.dtype, layer)
        self.ours.run(ours.step, q, *self.pages, output[:n], kv_scales)
        if ours.rest is not None:
            begin = ours.begin
            rest = (key[begin:], value[begin:], kv_cache, ours.rest, output[begin:])
            theirs(layer, query[begin:], *rest, *scales)
        return output

    def _reserve(self, layer: Any, query: Tensor, output: Tensor) -> None:
        """Take the memory of the largest step while vLLM measures what is left for its cache."""
        setting = compat.setting(self.vllm_config) if self.vllm_config is not None else None
        if setting is None or role_of(setting, layer.layer_name) is not Role.ANCHOR:
            return
        engine = engine_of(self.vllm_config, query.device)
        if engine.is_reserved:
            return
        engine.is_reserved = True
        ours = self._layer(layer, engine)
        assert ours is not None
        kv_heads: int = self.num_kv_heads  # type: ignore[attr-defined]
        longest = self.vllm_config.model_config.max_model_len
        is_float8 = str(self.kv_cache_dtype).startswith("fp8")  # type: ignore[attr-defined]
        ours.reserve(output[:1], kv_heads, FLOAT8 if is_float8 else output.dtype, longest)

    def _layer(self, layer: Any, engine: Shared) -> GraphLayer | None:
        """The layer, where it is ours; made once."""
        if self.is_sparse is None:
            role = engine.role(layer.layer_name)
            self.is_sparse = role in SPARSE
            if self.is_sparse:
                heads = compat.head_group(engine.setting.engine.heads)
                softcap = getattr(self, "logits_soft_cap", None) or None
                scale: float = self.scale  # type: ignore[attr-defined]
                number = compat.layer_number(layer.layer_name)
                self.ours = GraphLayer(engine.steps, role, scale, softcap, heads, number)
        return self.ours

    def _begin(self, layer: Any, kv_cache: Tensor, engine: Shared) -> bool:
        """Whether the layer is ours; what it reads is found out once, and anew with the cache."""
        self._layer(layer, engine)
        if self.is_sparse and (self.pages is None or self._of_another(kv_cache)):
            is_float8 = kv_cache.element_size() == 1
            pages = kv_cache.view(FLOAT8) if is_float8 else kv_cache
            keys, values = pages.chunk(2, dim=3)  # [blocks, G, block, D], any strides
            self.pages = keys, values
        return self.is_sparse is True

    def _of_another(self, kv_cache: Tensor) -> bool:
        """Whether the pages are those of another cache: the one of profiling is let go."""
        assert self.pages is not None
        keys = self.pages[0]
        return keys.data_ptr() != kv_cache.data_ptr() or keys.shape[0] != kv_cache.shape[0]


def _wide(q: Tensor, dtype: Any, layer: Any) -> Tensor:
    """The queries in their dtype: vLLM quantises them too, where its own kernel takes them so."""
    if q.element_size() > 1:
        return q
    scale: Tensor = layer._q_scale  # one number, or one for each KV head
    by_scale = q.float().view(len(q), scale.numel(), -1, q.shape[2]) * scale.view(-1, 1, 1)
    return by_scale.view(q.shape).to(dtype)


def _over(theirs: Any, name: str) -> Any:
    """The backend that stands where one of vLLM's stood: the same, but for its two classes.

    An engine that did not ask for us gets vLLM's own of each. vLLM keeps the layers of two backends
    apart by the names of their classes.
    """
    here, their_builder = {"__module__": __name__}, theirs.get_builder_cls()
    builder = type(f"{name}Builder", (Builder, their_builder), here | {"own": their_builder})
    impl = type(f"{name}Impl", (Impl, theirs.get_impl_cls()), here)

    def get_impl_cls() -> Any:
        return impl if _is_asked(get_current_vllm_config_or_none()) else theirs.get_impl_cls()

    def get_builder_cls() -> Any:  # no config is at hand here: `Builder.__new__` has one
        return builder

    own = {
        "get_impl_cls": staticmethod(get_impl_cls),
        "get_builder_cls": staticmethod(get_builder_cls),
    }
    return type(f"{name}Backend", (theirs,), here | own)


PulseFlashBackend = _over(flash_attn.FlashAttentionBackend, "PulseFlash")
PulseTritonBackend = _over(triton_attn.TritonAttentionBackend, "PulseTriton")
