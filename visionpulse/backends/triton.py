"""The Triton backend: any GPU that Triton supports, without a build; CPU tensors interpreted."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cache import MAX_QUERIES
from ..call import Call, Scored
from ..selection import Selection
from . import Backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _kernels() -> ModuleType:
    """The kernels, imported when first used: they need triton."""
    return importlib.import_module("visionpulse._triton")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on the tensors' device; Triton itself takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TritonBackend(Backend):
    """Kernels that Triton compiles on the machine where they run."""

    name = "triton"
    auto_devices = ("cuda",)
    max_queries = MAX_QUERIES
    reads_float8 = True

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        if _interpreted() or torch.cuda.is_available():
            return None
        return (
            "no GPU is visible to torch; TRITON_INTERPRET=1, set before the first call, runs the "
            "kernels in Triton's interpreter on CPU tensors (slow, for tests)"
        )

    def _refuses(self, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
        if tensor.dtype not in dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"it takes {known}, got {tensor.dtype}"
        wanted = "cpu" if _interpreted() else "cuda"
        if tensor.device.type == wanted:
            return None
        if wanted == "cuda":
            return (
                f"it takes tensors on a GPU, got {tensor.device}; "
                "TRITON_INTERPRET=1 runs it on CPU tensors (slow, for tests)"
            )
        return f"TRITON_INTERPRET=1 runs it on CPU tensors, got {tensor.device}; unset it for a GPU"

    def refuses(self, call: Call) -> str | None:
        return self._refuses(call.q, _DTYPES)

    def refuses_select(self, scored: Scored) -> str | None:
        return self._refuses(scored.scores, (torch.float32,))

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float32

    def score(self, call: Call) -> tuple[Scored, Tensor | None]:
        q, kv, params, visual = call.q, call.kv, call.params, call.visual
        sums = params.score == "logit" and q.dim() == 3
        scores, out = call.new_scores(), call.new_out() if call.is_dense else None
        kernels, masses = _kernels(), call.new_masses()
        with _on(q.device):
            stored_logits, head_stats = kernels.score(
                q, kv, visual, params, sums_only=sums, out=out, workspace=call.scratch,
                q_counts=call.q_counts,
            )  # fmt: skip
            kernels.finish_scores(
                stored_logits, head_stats, kv, q.shape[-2], visual, params,
                sums_only=sums, scores=scores, masses=masses, queries=call.queries,
                q_counts=call.q_counts,
            )  # fmt: skip
        return call.scored(scores, *masses), out

    def select(self, scored: Scored) -> Selection:
        selection = scored.new_selection(scored.mass.contiguous(), scored.mass_mean.contiguous())
        with _on(scored.scores.device):
            _kernels().select(
                scored.scores, selection, scored.visual, scored.params,
                starts=scored.starts, lengths=scored.lengths, workspace=scored.scratch,
                q_counts=scored.q_counts,
            )  # fmt: skip
        return selection

    def attend(self, call: Call) -> Tensor:
        q, kv, params, selection, out = call.q, call.kv, call.params, call.selection, call.new_out()
        with _on(q.device):
            if selection is None:
                _kernels().dense(
                    q, kv, params, out=out, workspace=call.scratch, q_counts=call.q_counts
                )
            else:
                _kernels().attend(
                    q, kv, call.visual, selection.indices, selection.counts, params,
                    stored_logits=None, out=out, workspace=call.scratch, q_counts=call.q_counts,
                )  # fmt: skip
        return out

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        """Score, select, and for a pruned output gather V: two launches, or three."""
        q, kv, params, visual = call.q, call.kv, call.params, call.visual
        kernels, out, workspace = _kernels(), call.new_out(), call.scratch
        dense = call.is_dense
        # a pruned output needs the logits of each head; a dense one by "logit" only their sums
        sums = dense and params.score == "logit" and q.dim() == 3
        selection = call.new_selection()
        with _on(q.device):
            stored_logits, head_stats = kernels.score(
                q, kv, visual, params,
                sums_only=sums, out=out if dense else None, workspace=workspace,
                q_counts=call.q_counts,
            )  # fmt: skip
            kernels.select_by_logits(
                stored_logits, head_stats, kv, q.shape[-2], visual, params, selection,
                sums_only=sums, scores=call.scores, workspace=workspace, queries=call.queries,
                q_counts=call.q_counts,
            )  # fmt: skip
            if not dense:
                kernels.attend(
                    q, kv, visual, selection.indices, selection.counts, params,
                    stored_logits=stored_logits, out=out, workspace=workspace,
                    q_counts=call.q_counts,
                )  # fmt: skip
        return out, selection
