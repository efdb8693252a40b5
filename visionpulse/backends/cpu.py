"""The native CPU kernels: one instruction set per process, chosen by `_C`."""

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .. import _native
from ..cache import MAX_QUERIES, Cache, KVCache
from ..call import Call, Scored
from ..selection import Selection
from ..workspace import Workspace
from ..workspace import default as default_workspace
from . import Backend
from .native import flat, refuses, refuses_scores

_CPU = torch.device("cpu")


def _gone() -> None:
    """What a reference gives whose object is gone."""


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
    _entries().write_pages(key, value, k_pages, v_pages, slots, torch.get_num_threads())


def _cache(kv: Cache) -> tuple[Any, ...]:
    """What the engine is handed of a cache; `csrc/cpu/read_call.h` reads it in this order."""
    if isinstance(kv, KVCache):
        return kv.k, kv.v, kv.starts, kv.lengths, kv.k_scale, kv.v_scale, None, True
    return (
        *(kv.k_pages, kv.v_pages, kv.starts, kv.lengths, kv.k_scale, kv.v_scale),
        *(kv.block_table, kv.layout == "HND"),
    )


class CpuBackend(Backend):
    """C++ kernels for float32, bfloat16 and float16 on the CPU; one instruction set per process."""

    name = "cpu"
    auto_devices = ("cpu",)
    max_queries = MAX_QUERIES
    reads_float8 = True

    def __init__(self) -> None:
        # Of the last call: its workspace, and the scratch memory that it gave. Most calls have the
        # same, and to look it up costs a follower of 8k tokens more than a hundredth of its time.
        self._scratch: tuple[Callable[[], Workspace | None], Callable[[], Tensor | None]]
        self._scratch = (_gone, _gone)

    def unavailable(self) -> str | None:
        reason = _native.failure()
        if reason is None:
            _check_instruction_set()
        return reason

    def refuses(self, call: Call) -> str | None:
        if call.q.device.type != "cpu":
            return f"it computes on the CPU, the tensors are on {call.q.device}"
        return refuses(call.q, call.kv)

    def refuses_select(self, scored: Scored) -> str | None:
        scores = scored.scores
        if not scores.is_cpu:
            return f"it computes on the CPU, the scores are on {scores.device}"
        return refuses_scores(scores)

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and bool(_entries().rounds_bf16_weights())

    def score(self, call: Call) -> tuple[Scored, Tensor | None]:
        visual, (mass, mean), scores = call.visual_set, call.new_masses(), call.new_scores()
        out = call.new_out() if call.is_dense else None
        given = (visual.spans, visual.offsets, mass, mean, call.params, scores)
        self._run(
            _entries().score, call.workspace,
            *(call.q, out, call.q_counts), *_cache(call.kv), *given,
        )  # fmt: skip
        return call.scored(scores, mass, mean), out

    def select(self, scored: Scored) -> Selection:
        scores, visual = scored.scores, scored.visual
        kept = scored.new_selection(flat(scored.mass), flat(scored.mass_mean))
        self._run(
            _entries().select, scored.workspace,
            *(scores, scores.shape[0] // visual.batch, scored.q_counts, scored.starts),
            *(scored.lengths, visual.spans, visual.offsets),
            *(kept.indices, kept.counts, kept.mass, kept.mass_mean, scored.params),
        )  # fmt: skip
        return kept

    # Behind a layer that filled the caches each function entered costs as much as a row of K, so
    # attend and decode make their tensors themselves.

    def attend(self, call: Call) -> Tensor:
        q, kv, params, visual, selection, out, _, workspace, q_counts, _ = call
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        listed: tuple[Tensor | None, ...] = (None, None, None, None)
        if selection is not None:
            assert visual is not None
            listed = visual.spans, visual.offsets, selection.indices, selection.counts
        self._run(_entries().attend, workspace, q, out, q_counts, *_cache(kv), *listed, params)
        return out

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        q, kv, params, visual, _, out, scores, workspace, q_counts, kept = call
        assert visual is not None
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if kept is None:
            rows = q.shape[:-2].numel()
            indices = torch.empty(rows, params.k_max, dtype=torch.int32, device=_CPU)
            counts = torch.empty(rows, dtype=torch.int32, device=_CPU)
            mass = torch.empty(rows, dtype=torch.float32, device=_CPU)
            kept = Selection(indices, counts, mass, torch.empty_like(mass), trusted=True)
        listed = visual.spans, visual.offsets, kept.indices, kept.counts, kept.mass, kept.mass_mean
        self._run(
            _entries().decode, workspace,
            *(q, out, q_counts), *_cache(kv), *listed, params, scores,
        )  # fmt: skip
        return out, kept

    def _run(self, enter: Any, workspace: Workspace | None, *given: Any) -> None:
        """Enter the engine, once more where it lacks scratch memory.

        So the scratch grows with the longest rows seen, and a steady decode loop allocates nothing
        but its results.
        """
        threads = torch.get_num_threads()
        workspace = workspace or default_workspace(_CPU)
        owner, last = self._scratch
        scratch = last() if owner() is workspace else None
        if scratch is None:
            scratch = self._take(workspace, 1)
        while lacking := enter(*given, scratch, threads):
            scratch = self._take(workspace, lacking)

    def _take(self, workspace: Workspace, size: int) -> Tensor:
        scratch = workspace.take("cpu", size, torch.uint8, _CPU)
        self._scratch = ref(workspace), ref(scratch)
        return scratch
