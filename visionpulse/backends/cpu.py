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
from ..cache import Cache
from ..call import Params
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import Workspace
from . import Backend
from . import packing as pack

_NO_SELECTION = (0, 0, 0)


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


def _run(workspace: Workspace, call: Callable[[tuple[int, int, int]], int]) -> None:
    threads = torch.get_num_threads()
    lacking = 1
    while lacking:
        scratch = workspace.take("cpu", lacking, torch.uint8, torch.device("cpu"))
        lacking = call((scratch.data_ptr(), scratch.numel(), threads))


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
        return pack.refuses(q, kv)

    def refuses_select(self, scores: Tensor, params: Params) -> str | None:
        if scores.device.type != "cpu":
            return f"it computes on the CPU, the scores are on {scores.device}"
        return pack.refuses_scores(scores)

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
        given = (pack.query(q, kv), pack.cache(kv), pack.visual(visual), pack.params(params))
        chosen = (0, 0, mass.data_ptr(), mass_mean.data_ptr())
        to = pack.NO_OUT if out is None else pack.output(out)
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
        selection = pack.empty_selection(scores.shape[0], params.k_max, mass, mass_mean)
        cut = (*scores.shape, pack.address(starts), pack.address(lengths))
        given = (
            *cut,
            pack.visual(visual),
            pack.params(params),
            pack.chosen(selection),
            scores.data_ptr(),
        )
        entry = _entries().select
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
        seen, kept = pack.NO_VISUAL, _NO_SELECTION
        if visual is not None and selection is not None:
            seen = pack.visual(visual)
            indices = selection.indices
            kept = (indices.data_ptr(), selection.counts.data_ptr(), indices.shape[1])
        given = (
            pack.query(q, kv),
            pack.cache(kv),
            seen,
            kept,
            pack.params(params),
            pack.output(out),
        )
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
        selection = pack.empty_selection(kv.batch, params.k_max, *pack.masses(kv.batch, q.device))
        given = (
            pack.query(q, kv),
            pack.cache(kv),
            pack.visual(visual),
            pack.params(params),
            pack.chosen(selection),
        )
        dense = params.anchor_output == "dense"
        entry, to, at = _entries().decode, pack.output(out), pack.address(scores)
        _run(workspace, lambda scratch: entry(*given, to, dense, at, scratch))
        return selection
