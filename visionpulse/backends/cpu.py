"""The native CPU kernels: addresses, strides and host numbers handed to `_C.cpu`.

Each call goes down once. It comes back with the bytes of scratch memory it lacks, or 0 when it has
run; so the scratch grows with the longest rows seen, and a steady decode loop allocates nothing.
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
_NO_VISUAL = (0, 0, 0)
_NO_SELECTION = (0, 0, 0)
_NO_OUT = (0, 0, 0)


@cache
def _entries() -> Any:
    return _native.module().cpu


def instruction_sets() -> list[str]:
    """The instruction sets that this build has and this CPU runs, the best first."""
    return list(_entries().instruction_sets())


def instruction_set() -> str:
    """The instruction set in use; `VISIONPULSE_CPU_ISA` forces one."""
    return str(_entries().instruction_set())


def use_instruction_set(name: str) -> None:
    """Change the instruction set of this process, as tests and benchmarks do."""
    _entries().use_instruction_set(name)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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


def _visual(visual: VisualTokens) -> tuple[int, ...]:
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


def _run(workspace: Workspace, call: Callable[[tuple[int, int, int]], int]) -> None:
    threads = torch.get_num_threads()
    lacking = 1
    while lacking:
        scratch = workspace.take("cpu", lacking, torch.uint8, torch.device("cpu"))
        lacking = call((scratch.data_ptr(), scratch.numel(), threads))


def _masses(rows: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows), torch.empty(rows)


def _empty_selection(rows: int, k_max: int, mass: Tensor, mass_mean: Tensor) -> Selection:
    indices = torch.empty(rows, k_max, dtype=torch.int32)
    counts = torch.empty(rows, dtype=torch.int32)
    return Selection(indices, counts, mass, mass_mean, trusted=True)


class CpuBackend(Backend):
    """C++ kernels for float32, bfloat16 and float16 on the CPU; one instruction set per process."""

    name = "cpu"
    auto_devices = ("cpu",)

    def unavailable(self) -> str | None:
        reason = _native.failure()
        if reason is None:
            instruction_set()  # a wrong VISIONPULSE_CPU_ISA is an error, no reason to look on
        return reason

    def refuses(
        self, q: Tensor, kv: Cache, visual: VisualTokens | None, params: Params
    ) -> str | None:
        if q.device.type != "cpu":
            return f"it computes on the CPU, the tensors are on {q.device}"
        if q.dtype not in _DTYPES:
            return f"it serves float32, bfloat16 and float16, not {q.dtype}"
        if q.shape[2] > _MAX_HEAD_DIM:
            return f"it serves head dims up to {_MAX_HEAD_DIM}, not {q.shape[2]}"
        if q.shape[1] > _MAX_GROUP * kv.kv_heads:
            return f"it serves up to {_MAX_GROUP} query heads per KV head"
        return None

    def refuses_select(self, scores: Tensor, params: Params) -> str | None:
        if scores.device.type != "cpu":
            return f"it computes on the CPU, the scores are on {scores.device}"
        if scores.dtype != torch.float32:
            return f"it selects from float32 scores, not {scores.dtype}"
        return None

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
        mass, mass_mean = _masses(kv.batch)
        given = (_query(q, kv), _cache(kv), _visual(visual), _params(params))
        chosen = (0, 0, mass.data_ptr(), mass_mean.data_ptr())
        to = _NO_OUT if out is None else _out(out)
        entry, at = _entries().score, scores.data_ptr()
        _run(workspace, lambda scratch: entry(*given, chosen, to, at, scratch))
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
        selection = _empty_selection(scores.shape[0], params.k_max, mass, mass_mean)
        cut = (*scores.shape, _address(starts), _address(lengths))
        given = (*cut, _visual(visual), _params(params), _chosen(selection), scores.data_ptr())
        entry = _entries().choose
        _run(workspace, lambda scratch: entry(*given, scratch))
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
            seen = _visual(visual)  # type: ignore[assignment]
            indices = selection.indices
            kept = (indices.data_ptr(), selection.counts.data_ptr(), indices.shape[1])
        given = (_query(q, kv), _cache(kv), seen, kept, _params(params), _out(out))
        entry = _entries().attend
        _run(workspace, lambda scratch: entry(*given, scratch))
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
        selection = _empty_selection(kv.batch, params.k_max, *_masses(kv.batch))
        given = (_query(q, kv), _cache(kv), _visual(visual), _params(params), _chosen(selection))
        dense = params.anchor_output == "dense"
        entry, to, at = _entries().decode, _out(out), _address(scores)
        _run(workspace, lambda scratch: entry(*given, to, dense, at, scratch))
        return selection
