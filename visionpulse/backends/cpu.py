"""The native CPU kernels: one instruction set per process, chosen by `_C`."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..call import Call, Scored
from ..visual import VisualTokens
from ..workspace import Workspace
from . import packing as pack
from .native import NativeBackend

_CPU = torch.device("cpu")


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


class CpuBackend(NativeBackend):
    """C++ kernels for float32, bfloat16 and float16 on the CPU; one instruction set per process."""

    name = "cpu"
    auto_devices = ("cpu",)

    def unavailable(self) -> str | None:
        reason = _native.failure()
        if reason is None:
            instruction_set()  # a wrong VISIONPULSE_CPU_ISA is an error, no reason to look on
        return reason

    def refuses(self, call: Call) -> str | None:
        if call.q.device.type != "cpu":
            return f"it computes on the CPU, the tensors are on {call.q.device}"
        return pack.refuses(call.q, call.kv)

    def refuses_select(self, scored: Scored) -> str | None:
        if scored.scores.device.type != "cpu":
            return f"it computes on the CPU, the scores are on {scored.scores.device}"
        return pack.refuses_scores(scored.scores)

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
