"""The ops as compiled code sees them: schemas, implementations, fakes.

A schema knows tensors and numbers only, so a call is taken apart by name on the way in and put
together on the way out. Eager calls reach a backend directly.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import workspace
from .backends import Backend, resolve
from .backends.by_query import fitted
from .cache import Cache, KVCache, PagedKVCache
from .call import Call, Params, Scored, filled, score_dtype
from .queries import count
from .selection import Selection
from .visual import VisualTokens

Fields: TypeAlias = dict[str, Any]  # the arguments of an op by their names

_QUERY = "Tensor q, Tensor? q_counts"  # [B, H, D], or [B, Q, H, D]
_CACHE = (
    "Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale,"
    " Tensor? block_table, Tensor? lengths, Tensor? starts, str layout"
)
_VISUAL = "Tensor spans, Tensor offsets, Tensor visual_counts, SymInt max_count"
_MATH = "float scale, float softcap, SymInt window"
_SCORING = f"{_MATH}, float tau, str score, str anchor_output"
_BUDGET = "float r_min, float r_max, str mass_of, SymInt k_max, Tensor? ratio, Tensor? wanted"
_SCHEMAS = {
    "decode": (
        f"{_QUERY}, {_CACHE}, {_VISUAL}, {_SCORING}, {_BUDGET}, str backend",
        "(Tensor out, Tensor indices, Tensor counts, Tensor mass, Tensor mass_mean)",
    ),
    "score": (
        f"{_QUERY}, {_CACHE}, {_VISUAL}, {_SCORING}, str backend",
        "(Tensor scores, Tensor mass, Tensor mass_mean, Tensor out)",
    ),
    "select": (
        f"Tensor scores, Tensor mass, Tensor mass_mean, {_VISUAL}, Tensor? starts,"
        f" Tensor? lengths, Tensor? q_counts, SymInt window, {_BUDGET}, str backend",
        "(Tensor indices, Tensor counts)",
    ),
    "attend": (
        f"{_QUERY}, {_CACHE}, {_VISUAL}, Tensor indices, Tensor counts, {_MATH}, str backend",
        "Tensor",
    ),
    "attend_dense": (f"{_QUERY}, {_CACHE}, {_MATH}, str backend", "Tensor"),
}
_NAMES = {
    op: tuple(argument.split()[-1] for argument in arguments.split(","))
    for op, (arguments, _) in _SCHEMAS.items()
}


class Compiled(Backend):
    """The stages as nodes of a graph; each finds its backend when the graph runs."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def score(self, call: Call) -> tuple[Scored, Tensor | None]:
        scores, mass, mass_mean, out = self._run("score", fields_of(call))
        if call.selected is not None:
            mass = call.selected.mass.copy_(mass)
            mass_mean = call.selected.mass_mean.copy_(mass_mean)
        scored = call.scored(_into(call.scores, scores), mass, mass_mean)
        return scored, _into(call.out, out) if call.is_dense else None

    def select(self, scored: Scored) -> Selection:
        indices, counts = self._run("select", fields_of(scored))
        result = Selection(indices, counts, scored.mass, scored.mass_mean, trusted=True)
        return filled(scored.selected, result)

    def attend(self, call: Call) -> Tensor:
        op = "attend_dense" if call.selection is None else "attend"
        return _into(call.out, self._run(op, fields_of(call)))

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        if call.scores is not None:  # which the op does not give
            return self.staged(call)
        out, indices, counts, mass, mass_mean = self._run("decode", fields_of(call))
        result = Selection(indices, counts, mass, mass_mean, trusted=True)
        return _into(call.out, out), filled(call.selected, result)

    def _run(self, op: str, fields: Fields) -> Any:
        return getattr(torch.ops.visionpulse, op)(*arguments(op, fields, self.backend))


def arguments(op: str, fields: Fields, backend: str) -> list[Any]:
    """The arguments of an op, in the order of its schema."""
    fields = {**fields, "backend": backend}
    return [fields[name] for name in _NAMES[op]]


def fields_of(call: Call | Scored) -> Fields:
    """A call by the names of the schemas."""
    fields: Fields = dict(zip(Params._fields, call.params, strict=True))
    if isinstance(call, Scored):
        fields |= {"scores": call.scores, "mass": call.mass, "mass_mean": call.mass_mean}
        fields |= {"starts": call.starts, "lengths": call.lengths, "q_counts": call.q_counts}
    else:
        kv = call.kv
        fields |= {"q": call.q, "q_counts": call.q_counts}
        fields |= {"lengths": kv.lengths, "starts": kv.starts}
        fields |= {"k_scale": kv.k_scale, "v_scale": kv.v_scale}
        if isinstance(kv, PagedKVCache):
            fields |= {"k": kv.k_pages, "v": kv.v_pages}
            fields |= {"block_table": kv.block_table, "layout": kv.layout}
        else:
            fields |= {"k": kv.k, "v": kv.v, "block_table": None, "layout": ""}
        if call.selection is not None:
            fields |= {"indices": call.selection.indices, "counts": call.selection.counts}
    visual = call.visual
    if visual is not None:
        fields |= {"spans": visual.spans, "offsets": visual.offsets}
        fields |= {"visual_counts": visual.counts, "max_count": visual.max_count}
    return fields


def _into(given: Tensor | None, result: Tensor) -> Tensor:
    return result if given is None else given.copy_(result)


def _params(fields: Fields) -> Params:
    return Params(**{name: fields[name] for name in Params._fields if name in fields})


def _visual(fields: Fields) -> VisualTokens | None:
    if "spans" not in fields:
        return None
    tables = (fields["spans"], fields["offsets"], fields["visual_counts"])
    return VisualTokens(*tables, fields["max_count"], size=0)  # the size was checked by the caller


def _call(fields: Fields, selection: Selection | None = None) -> tuple[Backend, Call]:
    """The call that the fields were, and its backend."""
    q, k, v, table = (fields[name] for name in ("q", "k", "v", "block_table"))
    cut = (fields["lengths"], fields["starts"])
    scales = (fields["k_scale"], fields["v_scale"])
    if table is None:
        kv: Cache = KVCache(k, v, *cut, *scales)
    else:
        kv = PagedKVCache(k, v, table, *cut, fields["layout"], *scales)
    call = Call(
        q, kv, _params(fields), _visual(fields), selection, workspace=_workspace(q.device),
        q_counts=fields["q_counts"],
    )  # fmt: skip
    queries = count(q)
    backend = resolve(fields["backend"], q.device, lambda b: b.against(call), queries)
    return fitted(backend, queries), call


def _workspace(device: torch.device) -> workspace.Workspace:
    """Scratch memory of one call on a GPU, of this thread elsewhere.

    A compiled step may run inside the memory pool of a CUDA graph, where torch refuses a tensor
    that outlives it. The price is a launch per op, which zeroes the counters.
    """
    return workspace.Workspace() if device.type == "cuda" else workspace.default(device)


def _decode(fields: Fields) -> tuple[Tensor, ...]:
    backend, call = _call(fields)
    out, selection = backend.decode(call)
    return out, selection.indices, selection.counts, selection.mass, selection.mass_mean


def _score(fields: Fields) -> tuple[Tensor, ...]:
    backend, call = _call(fields)
    scored, out = backend.score(call)
    if out is None:
        out = call.q.new_empty(0)
    return scored.scores, scored.mass, scored.mass_mean, out


def _select(fields: Fields) -> tuple[Tensor, ...]:
    scores, visual = fields["scores"], _visual(fields)
    assert visual is not None
    scored = Scored(
        scores, fields["mass"], fields["mass_mean"], visual, _params({"scale": 1.0, **fields}),
        fields["starts"], fields["lengths"], _workspace(scores.device), fields["q_counts"],
    )  # fmt: skip
    backend = resolve(fields["backend"], scores.device, lambda b: b.refuses_select(scored))
    selection = fitted(backend, len(scores) // visual.batch).select(scored)
    return selection.indices, selection.counts


def _attend(fields: Fields) -> Tensor:
    selection = None
    if "indices" in fields:
        mass = _per_row(fields["q"], torch.float32)  # followers never look at it
        selection = Selection(fields["indices"], fields["counts"], mass, mass, trusted=True)
    backend, call = _call(fields, selection)
    return backend.attend(call)


def _rows(like: Tensor) -> int:
    """Rows of scores [R, N] or of q, B or B * Q."""
    return like.shape[0] * like.shape[1] if like.dim() == 4 else like.shape[0]


def _per_row(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(_rows(like), dtype=dtype, device=like.device)


def _lists(like: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    indices = torch.empty((_rows(like), k_max), dtype=torch.int32, device=like.device)
    return indices, _per_row(like, torch.int32)


def _masses(q: Tensor) -> tuple[Tensor, Tensor]:
    return _per_row(q, score_dtype(q)), _per_row(q, score_dtype(q))


def _out_like(fields: Fields) -> Tensor:
    q = fields["q"]
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _decode_like(fields: Fields) -> tuple[Tensor, ...]:
    q = fields["q"]
    return _out_like(fields), *_lists(q, fields["k_max"]), *_masses(q)


def _score_like(fields: Fields) -> tuple[Tensor, ...]:
    q, k, table = fields["q"], fields["k"], fields["block_table"]
    slots = k.shape[1 if fields["layout"] == "NHD" else 2]  # of a page, or of a row
    size = slots if table is None else table.shape[1] * slots
    scores = torch.empty((_rows(q), size), dtype=score_dtype(q), device=q.device)
    # the dense output comes with the scores; where none is made the result is empty
    out = _out_like(fields) if fields["anchor_output"] == "dense" else q.new_empty(0)
    return scores, *_masses(q), out


def _select_like(fields: Fields) -> tuple[Tensor, ...]:
    return _lists(fields["scores"], fields["k_max"])


def _by_position(op: str, run: Callable[[Fields], Any]) -> Callable[..., Any]:
    return lambda *values: run(dict(zip(_NAMES[op], values, strict=True)))


_library: Any = torch.library.Library("visionpulse", "DEF")  # type: ignore[no-untyped-call]
for _op, _run, _fake in (
    ("decode", _decode, _decode_like),
    ("score", _score, _score_like),
    ("select", _select, _select_like),
    ("attend", _attend, _out_like),
    ("attend_dense", _attend, _out_like),
):
    _library.define(f"{_op}({_SCHEMAS[_op][0]}) -> {_SCHEMAS[_op][1]}")
    _library.impl(_op, _by_position(_op, _run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"visionpulse::{_op}", _by_position(_op, _fake), lib=_library)
