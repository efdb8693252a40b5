"""vLLM's CPU attention with our decode rows.

vLLM packs the keys of a block for its own kernels (transposed, or in tiles of AMX), which no
strides describe. So the blocks of an engine that asked for us hold plain rows, keys in the first
half of the last dimension and values in the second, as on a GPU. Rows of few tokens are read in
place: decode rows, drafted tokens behind them (each a decode row), and the ends of prefills, which
stay dense. Other rows are packed into a scratch cache and run by vLLM's own kernel.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn

from ...backends.cpu import CpuBackend, write_pages
from ...float8 import FLOAT8, read, stored
from ...workspace import default as workspace
from ..cores import spread_pool
from ..rows import RequestRow
from ..stats import Counters
from ..step import PREFILL, UNSCALED, DecodeRows, Layer, Steps
from . import compat
from .metrics import publish

FEW = 8  # query tokens of a row; more are run by vLLM's kernel, which reads their keys once
DENSE = RequestRow(PREFILL, ())


class PulseBackend(cpu_attn.CPUAttentionBackend):  # type: ignore[misc]
    """Stands where CPU_ATTN stood; an engine that did not ask for us gets vLLM's own classes."""

    @staticmethod
    def get_impl_cls() -> Any:
        """VLLM asks with the config at hand."""
        if compat.setting(get_current_vllm_config()) is None:
            return cpu_attn.CPUAttentionBackendImpl
        compat.account_memory()
        return PulseImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """No config is at hand where vLLM asks: whether we are wanted is seen where one is made."""
        return PulseBuilder


@dataclass
class Rest:
    """Rows that are not ours, as vLLM's kernel takes them, and the blocks that hold their keys."""

    begin: int  # their query tokens
    end: int
    blocks: Tensor  # int64, of the rows one after the other
    metadata: Any  # vLLM's own, over the scratch cache


@dataclass
class PulseMetadata:
    """What the builder gives to every layer of its group."""

    steps: Steps
    step: DecodeRows | None
    rests: list[Rest]


class PulseBuilder(cpu_attn.CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Splits a step into rows of few tokens, which are ours, and the rest."""

    def __new__(cls, spec: Any, names: list[str], vllm_config: Any, device: Any) -> Any:
        """An engine that did not ask for us gets vLLM's own builder."""
        if compat.setting(vllm_config) is None:
            return cpu_attn.CPUAttentionMetadataBuilder(spec, names, vllm_config, device)
        return super().__new__(cls)

    def __init__(self, spec: Any, names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(spec, names, vllm_config, device)
        setting = compat.setting(vllm_config)
        assert setting is not None
        drafted = getattr(vllm_config.speculative_config, "num_speculative_tokens", 0)
        # vLLM then puts rows of so few tokens first, decodes before prefills
        self.reorder_batch_threshold = max(FEW, 1 + drafted)
        self.longest = -(-vllm_config.model_config.max_model_len // self.block_size)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.steps = Steps(setting, rows, Counters())
        self.most_queries = CpuBackend.max_queries
        if compat.has_sparse_layers(vllm_config, names, setting):
            publish(vllm_config, setting, self.steps.counters)
        compat.watch_runner()
        spread_pool()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PulseMetadata:
        """The metadata of one step; vLLM's drafters name the arguments."""
        common = common_attn_metadata
        lengths: list[int] = common.seq_lens.tolist()
        tokens: list[int] = common.query_start_loc_cpu.diff().tolist()  # of each row
        n = next((i for i, m in enumerate(tokens) if m > self.reorder_batch_threshold), len(tokens))
        step = self._step(common, n, tokens, lengths) if n else None
        return PulseMetadata(self.steps, step, self._rests(common, n, lengths))

    def _step(
        self, common: CommonAttentionMetadata, n: int, tokens: list[int], lengths: list[int]
    ) -> DecodeRows:
        """The first `n` rows.

        Where they have as many tokens each, keys are read once for all tokens of a row, as far as
        the kernels do that; else each token is a row of its own.
        """
        known, prefills = compat.current_rows(), common.is_prefilling
        is_decode = [False] * n if known is None or prefills is None else (~prefills[:n]).tolist()
        rows = [known[i] if is_decode[i] and known else DENSE for i in range(n)]
        blocks = -(-max(lengths[:n]) // self.block_size)
        table, row_lengths = common.block_table_tensor[:n, :blocks], common.seq_lens[:n]
        if (most := max(tokens[:n])) == min(tokens[:n]) <= max(1, self.most_queries):
            return self.steps.make(rows, table, row_lengths, lengths[:n], most)
        of = [i for i in range(n) for _ in range(tokens[i])]
        seen = [lengths[i] - tokens[i] + 1 + j for i in range(n) for j in range(tokens[i])]
        index = torch.tensor(of)
        row_lengths = torch.tensor(seen, dtype=row_lengths.dtype)
        return self.steps.make([rows[i] for i in of], table[index], row_lengths, seen)

    def _rests(self, common: CommonAttentionMetadata, n: int, lengths: list[int]) -> list[Rest]:
        """The other rows, in parts that a scratch cache of the longest context holds."""
        rests, first, used = [], n, 0
        for row in range(n, common.num_reqs):
            blocks = -(-lengths[row] // self.block_size)
            if used and used + blocks > self.longest:
                rests.append(self._rest(common, first, row, lengths))
                first, used = row, 0
            used += blocks
        if used:
            rests.append(self._rest(common, first, common.num_reqs, lengths))
        return rests

    def _rest(
        self, common: CommonAttentionMetadata, first: int, end: int, lengths: list[int]
    ) -> Rest:
        starts: list[int] = common.query_start_loc_cpu[[first, end]].tolist()
        counts = [-(-length // self.block_size) for length in lengths[first:end]]
        blocks = [common.block_table_tensor[first + i, :count] for i, count in enumerate(counts)]
        before = torch.tensor([sum(counts[:i]) for i in range(len(counts))])
        table = (before[:, None] + torch.arange(max(counts))).to(torch.int32)
        own = common.replace(
            num_reqs=end - first,
            num_actual_tokens=starts[1] - starts[0],
            query_start_loc=common.query_start_loc[first : end + 1] - starts[0],
            query_start_loc_cpu=common.query_start_loc_cpu[first : end + 1] - starts[0],
            seq_lens=common.seq_lens[first:end],
            max_seq_len=max(lengths[first:end]),
            block_table_tensor=table,
            slot_mapping=common.slot_mapping[starts[0] : starts[1]],
        )
        return Rest(starts[0], starts[1], torch.cat(blocks).long(), super().build(0, own))


class PulseImpl(cpu_attn.CPUAttentionBackendImpl):  # type: ignore[misc]
    """One layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compat.refuse_layer(self)
        self.ours: Layer | None = None
        self.pages: tuple[Tensor, Tensor, Tensor] | None = None  # the cache, keys, values

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values as plain rows; tokens beyond the slots are padding."""
        keys, values = self._pages(kv_cache)
        if self.is_fp8_kv_cache:
            key, value = stored(key, layer._k_scale), stored(value, layer._v_scale)
        write_pages(key, value, keys, values, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PulseMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Our decode rows, then the others by vLLM's kernel."""
        if attn_metadata is None:
            return output  # vLLM warms up
        step = attn_metadata.step
        if step is not None:
            ours, (keys, values) = self._layer(layer, attn_metadata.steps), self._pages(kv_cache)
            n = step.rows * step.queries
            scales = (layer._k_scale, layer._v_scale) if self.is_fp8_kv_cache else UNSCALED
            ours.run(step, query[:n], keys, values, output[:n], scales)
        for rest in attn_metadata.rests:
            self._rest(layer, query, kv_cache, rest, output)
        return output

    def _layer(self, layer: Any, steps: Steps) -> Layer:
        if self.ours is None:
            heads = compat.head_group(steps.setting.engine.heads)
            number = compat.layer_number(layer.layer_name)
            window = self.sliding_window if self.sliding_window > 0 else None
            softcap = self.logits_soft_cap or None
            self.ours = Layer(steps, number, self.scale, softcap, window, heads)
        return self.ours

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [blocks, G, block, D]: views, made once a cache."""
        if self.pages is None or self.pages[0] is not kv_cache:
            pages = kv_cache.view(FLOAT8) if self.is_fp8_kv_cache else kv_cache
            keys, values = pages.chunk(2, dim=3)
            self.pages = kv_cache, keys, values
        return self.pages[1], self.pages[2]

    def _rest(
        self, layer: Any, query: Tensor, kv_cache: Tensor, rest: Rest, output: Tensor
    ) -> None:
        blocks, (_, kv_heads, size, width) = len(rest.blocks), kv_cache.shape
        rows = kv_cache[rest.blocks].transpose(1, 2).reshape(blocks * size, kv_heads, width)
        scratch = workspace(kv_cache.device).take(
            "serving", rows.numel(), kv_cache.dtype, kv_cache.device
        )
        scratch = scratch[: rows.numel()].view(blocks, kv_heads, size, width)
        slots = torch.arange(blocks * size)
        if self.is_fp8_kv_cache:
            # Without scales vLLM's kernel stores the same 8 bits again. With them it would cut a
            # step off numbers that a product has rounded down.
            rows = read(rows.view(FLOAT8), dtype=query.dtype)
        packs = SimpleNamespace(isa=layer.isa, _k_scale_float=1.0, _v_scale_float=1.0)
        keys, values = (half.contiguous() for half in rows.chunk(2, dim=2))
        super().do_kv_cache_update(packs, keys, values, scratch, slots)
        out = output[rest.begin : rest.end]
        super().forward(
            layer, query[rest.begin : rest.end], None, None, scratch, rest.metadata, out
        )
