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
from ..structs import Cache, Params, Selection, VisualTokens
from ..workspace import Workspace
from . import Backend

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCORES = {"prob": 0, "logit": 1, "prob_tau": 2}
_MAX_HEAD_DIM = 256
_MAX_GROUP = 32
_MAX_CAPACITY = 2**29  # the kernels mark positions with the bits above
_MAX_HEADS = 1024  # head masses that the select kernel holds at once
_MAX_ROWS = 65535  # of a grid
_NO_VISUAL = (0, 0, 0)
_NO_SELECTION = (0, 0, 0, 0)
_NO_OUT = (0, 0, 0)


@cache
def _entries() -> Any:
    return _native.module().cuda


@cache
def _unavailable(device: int) -> str | None:
    return _entries().unavailable(device) or None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _place(device: torch.device, visual: VisualTokens | None = None) -> tuple[int, int, int]:
    candidates = 0 if visual is None else visual.max_count
    if device.type != "cuda":  # the simulated GPU of the tests
        return 0, 0, candidates
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream, candidates


def _query(q: Tensor, kv: Cache) -> tuple[int, ...]:
    rows, heads, dim = q.shape
    return (
        *(q.data_ptr(), q.stride(0), q.stride(1)),
        *(_DTYPES[q.dtype], rows, heads, kv.kv_heads, dim),
    )


def _cache(kv: Cache) -> tuple[int, ...]:
    table: Tensor | None = kv.block_table if kv.is_paged else None  # type: ignore[union-attr]
    return (
        *(kv.k_data.data_ptr(), kv.v_data.data_ptr(), _address(kv.starts), _address(kv.lengths)),
        *((0, 0) if table is None else (table.data_ptr(), table.stride(0))),
        *kv.k_strides,
        *kv.v_strides,
        *(kv.capacity, kv.page_size, kv.k_data.shape[0]),
    )


def _visual(visual: VisualTokens) -> tuple[int, int, int]:
    return visual.spans.data_ptr(), visual.offsets.data_ptr(), visual.spans.shape[1]


def _params(params: Params) -> tuple[float, ...]:
    return (
        *(params.scale, params.softcap, params.window, params.tau, params.r_min, params.r_max),
        *(params.mass == "mean", _SCORES[params.score], params.k_max),
        *(_address(params.ratio), _address(params.counts)),
    )


def _out(out: Tensor) -> tuple[int, ...]:
    return out.data_ptr(), out.stride(0), out.stride(1)


def _chosen(selection: Selection) -> tuple[int, ...]:
    return (
        *(selection.indices.data_ptr(), selection.counts.data_ptr()),
        *(selection.mass.data_ptr(), selection.mass_mean.data_ptr()),
    )


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


def _masses(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, device=device), torch.empty(rows, device=device)


def _empty_selection(rows: int, k_max: int, mass: Tensor, mass_mean: Tensor) -> Selection:
    indices = torch.empty(rows, k_max, dtype=torch.int32, device=mass.device)
    counts = torch.empty(rows, dtype=torch.int32, device=mass.device)
    return Selection(indices, counts, mass, mass_mean, trusted=True)


class CudaBackend(Backend):
    """CUDA C++ kernels for float32, bfloat16 and float16 on NVIDIA GPUs from sm_80 on."""

    name = "cuda"
    auto_devices = ("cuda",)

    def unavailable(self) -> str | None:
        reason = _native.failure()
        if reason is not None:
            return reason
        if not _native.module().has_cuda:
            return "built without CUDA: no nvcc was found; put it on PATH and run: pip install -e ."
        return _unavailable(0)

    def refuses(
        self, q: Tensor, kv: Cache, visual: VisualTokens | None, params: Params
    ) -> str | None:
        reason = self._refuses_device(q)
        if reason is not None:
            return reason
        if q.dtype not in _DTYPES:
            return f"it serves float32, bfloat16 and float16, not {q.dtype}"
        if q.shape[2] > _MAX_HEAD_DIM:
            return f"it serves head dims up to {_MAX_HEAD_DIM}, not {q.shape[2]}"
        if q.shape[1] > min(_MAX_GROUP * kv.kv_heads, _MAX_HEADS):
            return f"it serves up to {_MAX_GROUP} query heads per KV head and {_MAX_HEADS} in all"
        if kv.capacity > _MAX_CAPACITY or kv.batch > _MAX_ROWS:
            return f"it serves up to {_MAX_ROWS} rows of {_MAX_CAPACITY} slots"
        return None

    def refuses_select(self, scores: Tensor, params: Params) -> str | None:
        reason = self._refuses_device(scores)
        if reason is not None:
            return reason
        if scores.dtype != torch.float32:
            return f"it selects from float32 scores, not {scores.dtype}"
        return None

    def _refuses_device(self, tensor: Tensor) -> str | None:
        if tensor.device.type not in self.auto_devices:
            return f"it computes on NVIDIA GPUs, the tensors are on {tensor.device}"
        return _unavailable(tensor.device.index or 0)

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
        mass, mass_mean = _masses(kv.batch, q.device)
        place = _place(q.device, visual)
        given = (place, _query(q, kv), _cache(kv), _visual(visual), _params(params))
        chosen = (0, 0, mass.data_ptr(), mass_mean.data_ptr())
        to = _NO_OUT if out is None else _out(out)
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
        selection = _empty_selection(scores.shape[0], params.k_max, mass, mass_mean)
        cut = (*scores.shape, _address(starts), _address(lengths))
        given = (_place(scores.device, visual), *cut, _visual(visual), _params(params))
        entry, chosen, at = _entries().choose, _chosen(selection), scores.data_ptr()
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
        seen, kept = _NO_VISUAL, _NO_SELECTION
        if visual is not None and selection is not None:
            seen = _visual(visual)
            indices, check = selection.indices, not selection.trusted
            kept = (indices.data_ptr(), selection.counts.data_ptr(), indices.shape[1], check)
        given = (_place(q.device), _query(q, kv), _cache(kv), seen, kept, _params(params))
        entry, to = _entries().attend, _out(out)
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
        selection = _empty_selection(kv.batch, params.k_max, *_masses(kv.batch, q.device))
        place = _place(q.device, visual)
        given = (place, _query(q, kv), _cache(kv), _visual(visual), _params(params))
        dense = params.anchor_output == "dense"
        entry, at = _entries().decode, _address(scores)
        after = (_chosen(selection), _out(out), dense, at)
        counters = q.shape[0] * q.shape[1]
        _run(workspace, q.device, counters, lambda s: entry(*given, *after, s))
        return selection
