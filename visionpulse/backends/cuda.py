"""The CUDA kernels: launched on the current stream of the tensors' device."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..cache import MAX_QUERIES
from ..call import Call, Scored
from ..queries import call_as_rows, scored_as_rows
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import Workspace
from . import Backend
from . import packing as pack
from .by_query import ByQuery
from .native import flat, refuses, refuses_scores

_MAX_CAPACITY = 2**29  # the kernels mark positions with the bits above
_MAX_HEADS = 1024  # head masses that the select kernel holds at once
_MAX_ROWS = 65535  # of a grid
_COPIES = ("auto", "async", "bulk")  # numbered as in plan.h
_copies = 0


@cache
def _entries() -> Any:
    return _native.module().cuda


def use_copies(name: str) -> None:
    """How whole tiles reach shared memory in this process, for tests and benchmarks.

    `bulk`: by the copy engine, from sm_90 on; `async`: by cp.async; `auto`: as suits the GPU.
    """
    global _copies
    if name not in _COPIES:
        raise ValueError(f"copies: expected one of {', '.join(_COPIES)}, got {name!r}")
    _copies = _COPIES.index(name)


@cache
def _unavailable(device: int) -> str | None:
    return _entries().unavailable(device) or None


def _place(device: torch.device, visual: VisualTokens | None) -> tuple[int, int, int, int]:
    candidates = 0 if visual is None else visual.max_count
    if device.type != "cuda":  # the simulated GPU of the tests
        return 0, 0, candidates, _copies
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream, candidates, _copies


class CudaBackend(Backend):
    """CUDA C++ kernels for float32, bfloat16, float16 and 8-bit caches, from sm_80 on."""

    name = "cuda"
    auto_devices = ("cuda",)
    max_queries = MAX_QUERIES
    reads_float8 = True

    def unavailable(self) -> str | None:
        reason = _native.failure()
        if reason is not None:
            return reason
        if not _native.module().has_cuda:
            return (
                "built without CUDA; with nvcc on PATH run: "
                "VISIONPULSE_CUDA_ARCHS=90 pip install -e . (90 for an H100; 80 for an A100, ...)"
            )
        # asking opens a context: on the device in use, not on the first one from every process
        is_up = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return _unavailable(torch.cuda.current_device() if is_up else 0)

    def refuses(self, call: Call) -> str | None:
        q, kv = call.q, call.kv
        reason = self._refuses_device(q)
        if reason is not None:
            return reason
        if q.shape[-2] > _MAX_HEADS:
            return f"it serves up to {_MAX_HEADS} query heads"
        if kv.capacity > _MAX_CAPACITY or call.rows > _MAX_ROWS:
            return f"it serves up to {_MAX_ROWS} rows of {_MAX_CAPACITY} slots"
        return refuses(q, kv)

    def refuses_select(self, scored: Scored) -> str | None:
        reason = self._refuses_device(scored.scores)
        if reason is not None:
            return reason
        return refuses_scores(scored.scores)

    def _refuses_device(self, tensor: Tensor) -> str | None:
        if tensor.device.type not in self.auto_devices:
            return f"it computes on NVIDIA GPUs, the tensors are on {tensor.device}"
        return _unavailable(tensor.device.index or 0)

    def score(self, call: Call) -> tuple[Scored, Tensor | None]:
        mass, mass_mean = call.new_masses()
        scores, out = call.new_scores(), call.new_out() if call.is_dense else None
        rows = call_as_rows(call) if call.queries > 1 else call  # held until its tensors are in use
        packed = (
            pack.queries(call.q, out, call.q_counts),
            *(pack.query(call.q, call.kv), pack.cache(call.kv), pack.visual(call.visual)),
            *(pack.params(call.params), (0, 0, mass.data_ptr(), mass_mean.data_ptr())),
            *(pack.output(out), scores.data_ptr(), pack.cache(rows.kv), pack.visual(rows.visual)),
        )
        self._run("score", call.q, call.scratch, call.visual, packed)
        return call.scored(scores, mass, mass_mean), out

    def select(self, scored: Scored) -> Selection:
        scored = scored_as_rows(scored)
        scores, params = scored.scores, scored.params
        selection = scored.new_selection(flat(scored.mass), flat(scored.mass_mean))
        queries = scores.shape[0] // scored.visual.batch
        packed = (
            (queries, 0, 0, pack.address(scored.q_counts)),
            *(*scores.shape, pack.address(scored.starts), pack.address(scored.lengths)),
            *(pack.visual(scored.visual), pack.params(params), pack.chosen(selection)),
            scores.data_ptr(),
        )
        self._run("select", scores, scored.scratch, scored.visual, packed)
        return selection

    def attend(self, call: Call) -> Tensor:
        """Dense attention reads K and V once for all queries; lists are gathered for each."""
        if call.queries > 1 and call.selection is not None:
            return ByQuery(self).attend(call)
        q, kv, params, visual, selection, *_ = call
        out = _new_out(call)
        packed = (
            *(pack.queries(q, out, call.q_counts), pack.query(q, kv), pack.cache(kv)),
            *(pack.visual(visual if selection is not None else None), pack.kept(selection)),
            *(pack.params(params), pack.output(out)),
        )
        self._run("attend", q, call.scratch, None, packed)
        return out

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        if call.queries > 1:
            return self.staged(call)
        selection, out = call.new_selection(), _new_out(call)
        packed = (
            *(pack.queries(call.q, out, call.q_counts), pack.query(call.q, call.kv)),
            *(pack.cache(call.kv), pack.visual(call.visual), pack.params(call.params)),
            *(pack.chosen(selection), pack.output(out)),
            *(call.is_dense, pack.address(call.scores)),
        )
        self._run("decode", call.q, call.scratch, call.visual, packed)
        return out, selection

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float32

    def _run(
        self,
        stage: str,
        like: Tensor,
        workspace: Workspace,
        visual: VisualTokens | None,
        packed: tuple[Any, ...],
    ) -> None:
        """Enter the engine for a stage; `like` is q, or the scores [B, N] of select.

        It comes back with the bytes of scratch memory it lacks, or 0 when it is queued; so the
        scratch grows with the longest rows seen, and a steady decode loop allocates nothing but its
        results.
        """
        device, counters = like.device, like.numel() // like.shape[-1]  # one per row and head
        enter, place = getattr(_entries(), stage), _place(device, visual)
        armed = workspace.zeroed("cuda counters", counters, torch.int32, device)
        lacking = 1
        while lacking:
            scratch = workspace.take("cuda", lacking, torch.uint8, device)
            given = (scratch.data_ptr(), scratch.numel(), armed.data_ptr())
            lacking = enter(place, *packed, given)


def _new_out(call: Call) -> Tensor:
    """Where the output goes; torch makes a tensor like another in two thirds of the time."""
    if call.out is None and call.q.is_contiguous():
        return torch.empty_like(call.q)
    return call.new_out()
