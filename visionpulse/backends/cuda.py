"""The CUDA kernels: addresses, strides, host numbers and the stream handed to `_C.cuda`.

Each call goes down once and returns when its launches are queued. It comes back with the bytes of
scratch memory it lacks, or 0; so the scratch grows with the largest shapes seen, and a steady
decode loop allocates nothing but its results.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..cache import Cache
from ..call import Params
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import Workspace
from . import Backend
from . import packing as pack

_MAX_CAPACITY = 2**29  # the kernels mark positions with the bits above
_MAX_HEADS = 1024  # head masses that the select kernel holds at once
_MAX_ROWS = 65535  # of a grid
_NO_SELECTION = (0, 0, 0, 0)
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


def _place(device: torch.device, visual: VisualTokens | None = None) -> tuple[int, int, int, int]:
    candidates = 0 if visual is None else visual.max_count
    if device.type != "cuda":  # the simulated GPU of the tests
        return 0, 0, candidates, _copies
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream, candidates, _copies


def _run(
    workspace: Workspace,
    device: torch.device,
    counters: int,
    call: Callable[[tuple[int, int, int]], int],
) -> None:
    armed = workspace.zeroed("cuda counters", counters, torch.int32, device)
    lacking = 1
    while lacking:
        scratch = workspace.take("cuda", lacking, torch.uint8, device)
        lacking = call((scratch.data_ptr(), scratch.numel(), armed.data_ptr()))


class CudaBackend(Backend):
    """CUDA C++ kernels for float32, bfloat16 and float16 on NVIDIA GPUs from sm_80 on."""

    name = "cuda"
    auto_devices = ("cuda",)

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

    def refuses(
        self, q: Tensor, kv: Cache, visual: VisualTokens | None, params: Params
    ) -> str | None:
        reason = self._refuses_device(q)
        if reason is not None:
            return reason
        if q.shape[1] > _MAX_HEADS:
            return f"it serves up to {_MAX_HEADS} query heads"
        if kv.capacity > _MAX_CAPACITY or kv.batch > _MAX_ROWS:
            return f"it serves up to {_MAX_ROWS} rows of {_MAX_CAPACITY} slots"
        return pack.refuses(q, kv)

    def refuses_select(self, scores: Tensor, params: Params) -> str | None:
        reason = self._refuses_device(scores)
        if reason is not None:
            return reason
        return pack.refuses_scores(scores)

    def _refuses_device(self, tensor: Tensor) -> str | None:
        if tensor.device.type not in self.auto_devices:
            return f"it computes on NVIDIA GPUs, the tensors are on {tensor.device}"
        return _unavailable(tensor.device.index or 0)

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float32

    def score(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens,
        params: Params,
        *,
        scores: Tensor,
        out: Tensor | None,
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor]:
        mass, mass_mean = pack.masses(kv.batch, q.device)
        place = _place(q.device, visual)
        given = (place, pack.query(q, kv), pack.cache(kv), pack.visual(visual), pack.params(params))
        chosen = (0, 0, mass.data_ptr(), mass_mean.data_ptr())
        to = pack.NO_OUT if out is None else pack.output(out)
        entry, at = _entries().score, scores.data_ptr()
        counters = q.shape[0] * q.shape[1]
        _run(workspace, q.device, counters, lambda s: entry(*given, chosen, to, at, s))
        return mass, mass_mean

    def select(
        self,
        scores: Tensor,
        mass: Tensor,
        mass_mean: Tensor,
        visual: VisualTokens,
        params: Params,
        *,
        starts: Tensor | None,
        lengths: Tensor | None,
        workspace: Workspace,
    ) -> Selection:
        mass, mass_mean = mass.float().contiguous(), mass_mean.float().contiguous()
        scores = scores.contiguous()
        selection = pack.empty_selection(scores.shape[0], params.k_max, mass, mass_mean)
        cut = (*scores.shape, pack.address(starts), pack.address(lengths))
        given = (_place(scores.device, visual), *cut, pack.visual(visual), pack.params(params))
        entry, chosen, at = _entries().choose, pack.chosen(selection), scores.data_ptr()
        _run(workspace, scores.device, scores.shape[0], lambda s: entry(*given, chosen, at, s))
        return selection

    def attend(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens | None,
        selection: Selection | None,
        params: Params,
        *,
        out: Tensor,
        workspace: Workspace,
    ) -> Tensor:
        seen, kept = pack.NO_VISUAL, _NO_SELECTION
        if visual is not None and selection is not None:
            seen = pack.visual(visual)
            indices, check = selection.indices, not selection.trusted
            kept = (indices.data_ptr(), selection.counts.data_ptr(), indices.shape[1], check)
        given = (
            _place(q.device),
            pack.query(q, kv),
            pack.cache(kv),
            seen,
            kept,
            pack.params(params),
        )
        entry, to = _entries().attend, pack.output(out)
        counters = q.shape[0] * q.shape[1]
        _run(workspace, q.device, counters, lambda s: entry(*given, to, s))
        return out

    def decode(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens,
        params: Params,
        *,
        scores: Tensor | None,
        out: Tensor,
        workspace: Workspace,
    ) -> Selection:
        selection = pack.empty_selection(kv.batch, params.k_max, *pack.masses(kv.batch, q.device))
        place = _place(q.device, visual)
        given = (place, pack.query(q, kv), pack.cache(kv), pack.visual(visual), pack.params(params))
        dense = params.anchor_output == "dense"
        entry, at = _entries().decode, pack.address(scores)
        after = (pack.chosen(selection), pack.output(out), dense, at)
        counters = q.shape[0] * q.shape[1]
        _run(workspace, q.device, counters, lambda s: entry(*given, *after, s))
        return selection
