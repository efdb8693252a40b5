"""The plugin of SGLang 0.5.23: an attention backend for decode steps, in this one file.

python -m sglang.launch_server --model-path MODEL --decode-attention-backend visionpulse

The environment's VISIONPULSE_SERVING has the setting, as JSON. Ours stands over a backend of
SGLang's (Triton on a GPU, torch on a CPU), which keeps prefill, drafts and the layers before the
anchor. Keys and values are read in place: a pool of tokens is one of pages that hold a token each,
and a request's row of `req_to_token` is its block table. Between replays of a graph the rows of a
step are written into memory that stays, as for vLLM.

Tested against SGLang's own classes on a CPU; no engine of it was run.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..models.tensor_parallel import HeadGroup
from ..schedule import Role
from .graphs import GraphLayer, GraphSteps
from .rows import RequestRow, Requests, spans_of
from .setting import Engine, Obstacle, Setting, asked_of, setting_of

NAME = "visionpulse"  # of --decode-attention-backend
FULL = "full_attention"  # in layer_types
POOL = "MHATokenToKVPool"  # keys and values of a layer are [tokens, G, D]
VISUAL = ("IMAGE", "VIDEO")  # not AUDIO
REPLAY_VIEW = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.build_replay_fb_view"


def register() -> None:
    """The `sglang.srt.plugins` entry point: the name of a backend more, and its pictures."""
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(backend_of)
    HookRegistry.register(REPLAY_VIEW, with_pictures, HookType.AFTER)


def with_pictures(view: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep in what a graph is replayed with whose pictures the rows have."""
    batch = kwargs["forward_batch"] if "forward_batch" in kwargs else args[0]
    view.mm_inputs, view.rids = batch.mm_inputs, batch.rids
    return view


def backend_of(runner: Any) -> Any:
    """The backend of a model's runner; a draft model has SGLang's own."""
    theirs: Any
    if torch.device(runner.device).type == "cpu":
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        theirs = TorchNativeAttnBackend
    else:
        from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

        theirs = TritonAttnBackend
    if runner.is_draft_worker:
        return theirs(runner)
    return type("PulseAttnBackend", (Decode, theirs), {})(runner)


def engine_of(runner: Any) -> Engine:
    """The facts about an engine."""
    from sglang.srt.runtime_context import get_parallel, get_spec

    parallel, text = get_parallel(), runner.model_config.hf_text_config
    types = getattr(text, "layer_types", None)
    device = torch.device(runner.device).type
    return Engine(
        full=tuple(t == FULL for t in types or (FULL,) * text.num_hidden_layers),
        heads=text.num_attention_heads,
        tensor_ranks=parallel.tp_size,
        device=device,
        has_graphs=device != "cpu",
        has_drafts=get_spec().speculative_algorithm is not None,
        obstacles=tuple(_obstacles(runner, parallel)),
    )


def _obstacles(runner: Any, parallel: Any) -> Iterable[Obstacle]:
    pool = type(runner.token_to_kv_pool).__name__
    if not runner.model_config.is_multimodal:
        yield Obstacle("a model without pictures", "serve a vision-language model")
    if pool != POOL:
        yield Obstacle(
            f"a KV pool {pool}: only {POOL} holds keys and values token by token",
            "serve a model with grouped-query attention in all layers, and no unified pool",
        )
    if runner.kv_cache_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield Obstacle(f"--kv-cache-dtype of {runner.kv_cache_dtype}", "leave the flag out")
    if parallel.pp_size > 1:
        yield Obstacle(
            f"--pp-size {parallel.pp_size}: a selection does not cross stages", "set --pp-size 1"
        )


class Decode:
    """What stands over SGLang's backend: `req_to_token_pool` and `token_to_kv_pool` are its own."""

    req_to_token_pool: Any
    token_to_kv_pool: Any

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)  # type: ignore[call-arg]
        self.setting: Setting = setting_of(asked_of(None) or {}, engine_of(runner))
        tokens: Tensor = self.req_to_token_pool.req_to_token  # int32 [requests, longest]
        rows, longest = tokens.shape
        self.steps = GraphSteps(self.setting, rows, longest, tokens.device)
        self.block_table: Tensor | None = None  # of graphs
        with torch.inference_mode(False):
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=tokens.device)
        self.step: Any = None  # None where SGLang's backend runs all rows
        self._layers: dict[int, GraphLayer | None] = {}
        self._requests = Requests()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make what graphs of up to `max_bs` rows read."""
        super().init_cuda_graph_state(max_bs, max_num_tokens)  # type: ignore[misc]
        tokens = self.req_to_token_pool.req_to_token
        with torch.inference_mode(False):
            self.block_table = tokens.new_zeros(max_bs, tokens.shape[1])

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Begin an eager step."""
        super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        self._begin(forward_batch, _rows(forward_batch, self._requests), None)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Begin a step that is captured or replayed."""
        theirs: Any = super()
        theirs.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        known = [] if in_capture else _rows(forward_batch, self._requests)
        self._begin(forward_batch, known, self.block_table)

    def _begin(self, batch: Any, known: list[RequestRow], table: Tensor | None) -> None:
        """Find out what the rows of a decode step are; for a graph, in memory that stays."""
        self.step = None
        if not batch.forward_mode.is_decode():
            return
        n, tokens = batch.batch_size, self.req_to_token_pool.req_to_token
        out = None if table is None else table[:n]
        own = torch.index_select(tokens, 0, batch.req_pool_indices[:n], out=out)
        self.lengths[:n].copy_(batch.seq_lens[:n])
        self.step = self.steps.make(known, n, own, self.lengths)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **more: Any,
    ) -> Tensor:
        """Attend as the layer's role says."""
        ours = self._layer(layer)
        if self.step is None or ours is None:
            theirs: Any = super()
            made: Tensor = theirs.forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache, **more
            )
            return made
        if wrong := [name for name, value in more.items() if value is not None]:
            raise ValueError(
                f"{NAME} cannot serve a layer with {', '.join(wrong)}; choose another "
                "--decode-attention-backend"
            )
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, _write_loc(forward_batch), k, v, layer.k_scale, layer.v_scale)
        pages = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        keys, values = (buffer.unsqueeze(2) for buffer in pages)  # [tokens, G, 1, D]
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(q)
        ours.run(self.step, q, keys, values, out)
        return out.flatten(1)

    def _layer(self, layer: Any) -> GraphLayer | None:
        """The layer, where it is ours; made once."""
        number = layer.layer_id
        if number not in self._layers:
            roles = self.setting.roles
            role = roles[number] if number < len(roles) else Role.MODEL
            follows = role in (Role.ANCHOR, Role.FOLLOWER)
            self._layers[number] = self._made(layer, role) if follows else None
        return self._layers[number]

    def _made(self, layer: Any, role: Role) -> GraphLayer:
        heads = self.setting.engine.heads
        group = None
        if layer.tp_q_head_num < heads:
            from sglang.srt.distributed.parallel_state import get_attn_tp_group

            group = HeadGroup(get_attn_tp_group().device_group, heads)
        softcap = layer.logit_cap or None
        return GraphLayer(self.steps, role, layer.scaling, softcap, group, layer.layer_id)


def _write_loc(batch: Any) -> Any:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    return KVWriteLoc.for_batch(batch)


def _rows(batch: Any, requests: Requests) -> list[RequestRow]:
    """The requests of a decode batch, row by row; none where it is no request's."""
    if not batch.forward_mode.is_decode() or not batch.rids:
        return []
    requests.forget_all_but(batch.rids)
    pictures = batch.mm_inputs or [None] * len(batch.rids)
    return [_row(*one, requests) for one in zip(batch.rids, pictures, strict=True)]


def _row(name: str, pictures: Any, requests: Requests) -> RequestRow:
    found = requests.get(name, pictures)
    if found is not None:
        return found
    items = pictures.mm_items if pictures is not None else ()
    runs = (
        (begin, last + 1)  # SGLang's last is inclusive
        for item in items
        if item.modality.name in VISUAL
        for begin, last in item.offsets or ()
    )
    return requests.put(pictures, RequestRow(name, spans_of(runs)))
