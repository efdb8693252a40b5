"""The native CPU kernels: one instruction set per process, chosen by `_C`."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..cache import MAX_QUERIES, KVCache
from ..call import Call, Params, Scored
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import Workspace
from . import packing as pack
from .native import NativeBackend

_CPU = torch.device("cpu")
_NO_CHOICE = pack.params(Params(scale=1.0))[3:]  # the numbers that attend does not read


@cache
def _entries() -> Any:
    return _native.module().cpu


def instruction_sets() -> list[str]:
    """The instruction sets that this build has and this CPU runs, the best first."""
    return list(_entries().instruction_sets())


def instruction_set() -> str:
    """The instruction set in use; `VISIONPULSE_CPU_ISA` forces one."""
    return str(_entries().instruction_set())


@cache
def _check_instruction_set() -> None:
    """A wrong `VISIONPULSE_CPU_ISA` is an error, no reason to look for another backend."""
    instruction_set()


def use_instruction_set(name: str) -> None:
    """Change the instruction set of this process, as tests and benchmarks do."""
    _entries().use_instruction_set(name)


def write_pages(
    key: Tensor, value: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> None:
    """Copy tokens, [tokens, G, D], to their slots in pages [P, G, page, D]; int64 `slots` [tokens].

    Token t goes to slot `slots[t] % page` of page `slots[t] // page`; a negative one is left out.
    All are on the CPU, of one dtype and with a unit last stride, which the caller has checked.
    """
    (pages, heads, size, dim), item = k_pages.shape, k_pages.element_size()
    _entries().write_pages(
        (
            *(key.data_ptr(), value.data_ptr()),
            *(item * stride for t in (key, value) for stride in t.stride()[:2]),
            slots.data_ptr(),
        ),
        (
            *(k_pages.data_ptr(), v_pages.data_ptr()),
            *(item * stride for t in (k_pages, v_pages) for stride in t.stride()[:3]),
        ),
        (len(slots), pages, size, heads, item * dim, torch.get_num_threads()),
    )


def _plain(call: Call) -> tuple[tuple[int, ...], ...] | None:
    """The queries, q and the cache of a layer's call as one query makes it; None for another."""
    q, kv, _, _, _, out, *_ = call
    if not (kv.k_scale is kv.v_scale is out is None) or q.dim() != 3 or not q.is_contiguous():
        return None
    starts, lengths = kv.starts, kv.lengths
    if isinstance(kv, KVCache):
        k, v, table, page = kv.k, kv.v, (0, 0), 0
        outer, kv_heads, capacity, _ = k.shape
        k_strides, v_strides = k.stride()[:3], v.stride()[:3]
    else:
        k, v, ids = kv.k_pages, kv.v_pages, kv.block_table
        head, slot = (1, 2) if kv.layout == "HND" else (2, 1)
        sizes, of_k, of_v = k.shape, k.stride(), v.stride()
        outer, kv_heads, page = sizes[0], sizes[head], sizes[slot]
        table, capacity = (ids.data_ptr(), ids.stride(0)), ids.shape[1] * page
        k_strides, v_strides = (of_k[0], of_k[head], of_k[slot]), (of_v[0], of_v[head], of_v[slot])
    (rows, heads, dim), (q_row, q_head, _) = q.shape, q.stride()
    return (
        (1, 0, 0, 0),
        (q.data_ptr(), q_row, q_head, pack.DTYPES[q.dtype], rows, heads, kv_heads, dim),
        (
            *(k.data_ptr(), v.data_ptr()),
            0 if starts is None else starts.data_ptr(),
            0 if lengths is None else lengths.data_ptr(),
            *(*table, *k_strides, *v_strides),
            *(capacity, page, outer, pack.STORAGES[k.dtype], 0, 0, 0, 0),
        ),
    )


class CpuBackend(NativeBackend):
    """C++ kernels for float32, bfloat16 and float16 on the CPU; one instruction set per process."""

    name = "cpu"
    auto_devices = ("cpu",)
    max_queries = MAX_QUERIES
    reads_float8 = True

    def unavailable(self) -> str | None:
        reason = _native.failure()
        if reason is None:
            _check_instruction_set()
        return reason

    def refuses(self, call: Call) -> str | None:
        if call.q.device.type != "cpu":
            return f"it computes on the CPU, the tensors are on {call.q.device}"
        return pack.refuses(call.q, call.kv)

    def refuses_select(self, scored: Scored) -> str | None:
        scores = scored.scores
        if not scores.is_cpu:
            return f"it computes on the CPU, the scores are on {scores.device}"
        return pack.refuses_scores(scores)

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and bool(_entries().rounds_bf16_weights())

    def attend(self, call: Call) -> Tensor:
        """Pack a plain call without a frame for each of its parts, as `decode` does.

        Behind a layer that filled the caches each function entered costs as much as a row of K.
        `NativeBackend` packs the same, and every other call.
        """
        plain = _plain(call)
        if plain is None:
            return super().attend(call)
        q, _, params, visual, selection, *_ = call
        out = torch.empty_like(q)
        spans, kept = (0, 0, 0), (0, 0, 0)
        if selection is not None:
            spans, indices = pack.visual(visual), selection.indices
            kept = indices.data_ptr(), selection.counts.data_ptr(), indices.shape[1]
        numbers, to = (*params[:3], *_NO_CHOICE), (out.data_ptr(), *out.stride()[:2])
        self._run("attend", q, call.scratch, None, (*plain, spans, kept, numbers, to))
        return out

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        plain = _plain(call)
        if plain is None or call.selected is not None:
            return super().decode(call)
        q, _, params, visual, *_ = call
        rows, scores = q.shape[0], call.scores
        out = torch.empty_like(q)
        indices = torch.empty(rows, params.k_max, dtype=torch.int32, device=_CPU)
        counts = torch.empty(rows, dtype=torch.int32, device=_CPU)
        mass = torch.empty(rows, dtype=torch.float32, device=_CPU)
        mean = torch.empty_like(mass)
        packed = (
            *(*plain, pack.visual(visual), pack.params(params)),
            (indices.data_ptr(), counts.data_ptr(), mass.data_ptr(), mean.data_ptr()),
            (out.data_ptr(), *out.stride()[:2]),
            *(params.anchor_output == "dense", 0 if scores is None else scores.data_ptr()),
        )
        self._run("decode", q, call.scratch, visual, packed)
        return out, Selection(indices, counts, mass, mean, trusted=True)

    def _queries(self, packed: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return (packed,)

    def _run(
        self,
        stage: str,
        like: Tensor,
        workspace: Workspace,
        visual: VisualTokens | None,
        packed: tuple[Any, ...],
    ) -> None:
        enter, threads = getattr(_entries(), stage), torch.get_num_threads()
        lacking = 1
        while lacking:
            scratch = workspace.take("cpu", lacking, torch.uint8, _CPU)
            lacking = enter(*packed, (scratch.data_ptr(), scratch.numel(), threads))
