"""The stages of an engine in `_C`, the same for the CPU and CUDA.

A call goes down once. It comes back with the bytes of scratch memory it lacks, or 0 when it has
run or is queued; so the scratch grows with the longest rows seen, and a steady decode loop
allocates nothing but its results.
"""

from typing import Any

import torch
from torch import Tensor

from ..call import Call, Scored
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import Workspace
from . import Backend
from . import packing as pack


class NativeBackend(Backend):
    """Arguments packed and results allocated; `_run` enters the engine."""

    def _run(
        self,
        stage: str,
        like: Tensor,
        workspace: Workspace,
        visual: VisualTokens | None,
        packed: tuple[Any, ...],
    ) -> None:
        """Enter the engine for a stage; `like` is q, or the scores [B, N] of select."""
        raise NotImplementedError

    def score(self, call: Call) -> tuple[Scored, Tensor | None]:
        mass, mass_mean = call.new_masses()
        scores, out = call.new_scores(), call.new_out() if call.is_dense else None
        rows = self._rows(call)  # held until its tensors are in use
        packed = (
            *self._queries(pack.queries(call.q, out, call.q_counts)),
            *(pack.query(call.q, call.kv), pack.cache(call.kv), pack.visual(call.visual)),
            *(pack.params(call.params), (0, 0, mass.data_ptr(), mass_mean.data_ptr())),
            *(pack.output(out), scores.data_ptr()),
            *(() if rows is None else (pack.cache(rows.kv), pack.visual(rows.visual))),
        )
        self._run("score", call.q, call.scratch, call.visual, packed)
        return call.scored(scores, mass, mass_mean), out

    def select(self, scored: Scored) -> Selection:
        scores, params = scored.scores, scored.params
        selection = scored.new_selection(_flat(scored.mass), _flat(scored.mass_mean))
        queries = scores.shape[0] // scored.visual.batch
        packed = (
            *self._queries((queries, 0, 0, pack.address(scored.q_counts))),
            *(*scores.shape, pack.address(scored.starts), pack.address(scored.lengths)),
            *(pack.visual(scored.visual), pack.params(params), pack.chosen(selection)),
            scores.data_ptr(),
        )
        self._run("select", scores, scored.scratch, scored.visual, packed)
        return selection

    def attend(self, call: Call) -> Tensor:
        q, kv, params, visual, selection, *_ = call
        out = _new_out(call)
        packed = (
            *self._queries(pack.queries(q, out, call.q_counts)),
            *(pack.query(q, kv), pack.cache(kv)),
            *(pack.visual(visual if selection is not None else None), self._kept(selection)),
            *(pack.params(params), pack.output(out)),
        )
        self._run("attend", q, call.scratch, None, packed)
        return out

    def _queries(self, packed: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The queries of a row, to an engine whose kernels take several."""
        return ()

    def _rows(self, call: Call) -> Call | None:
        """The call with each query as a row, to an engine that makes scores by row."""
        return None

    def _kept(self, selection: Selection | None) -> tuple[int, ...]:
        return pack.kept(selection)

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        selection, out = call.new_selection(), _new_out(call)
        packed = (
            *self._queries(pack.queries(call.q, out, call.q_counts)),
            *(pack.query(call.q, call.kv), pack.cache(call.kv), pack.visual(call.visual)),
            *(pack.params(call.params), pack.chosen(selection), pack.output(out)),
            *(call.is_dense, pack.address(call.scores)),
        )
        self._run("decode", call.q, call.scratch, call.visual, packed)
        return out, selection


def _new_out(call: Call) -> Tensor:
    """Where the output goes; torch makes a tensor like another in two thirds of the time."""
    if call.out is None and call.q.is_contiguous():
        return torch.empty_like(call.q)
    return call.new_out()


def _flat(mass: Tensor) -> Tensor:
    """A mass as the engines read it."""
    if mass.dtype == torch.float32 and mass.is_contiguous():
        return mass
    return mass.float().contiguous()
