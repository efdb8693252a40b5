"""The ops as torch.library sees them: schemas, implementations, fakes.

Only compiled code goes through here; eager calls reach a backend directly. An op takes the fields
of the records one by one, because a schema knows tensors and numbers only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import workspace
from .backends import Backend, mass_dtype, resolve
from .cache import Cache, KVCache, PagedKVCache
from .call import Params
from .selection import Selection
from .visual import VisualTokens

_CACHE = "Tensor k, Tensor v, Tensor? block_table, Tensor? lengths, Tensor? starts, str layout"
_VISUAL = "Tensor spans, Tensor offsets, Tensor visual_counts, SymInt max_count"
_MATH = "float scale, float softcap, SymInt window"
_SCORING = f"{_MATH}, float tau, str score, str anchor_output"
_BUDGET = "float r_min, float r_max, str mass_of, SymInt k_max, Tensor? ratio, Tensor? wanted"

_library = torch.library.Library("visionpulse", "DEF")  # type: ignore[no-untyped-call]
_define: Callable[[str], None] = _library.define
_define(
    f"decode(Tensor q, {_CACHE}, {_VISUAL}, {_SCORING}, {_BUDGET}, str backend)"
    " -> (Tensor out, Tensor indices, Tensor counts, Tensor mass, Tensor mass_mean)"
)
_define(
    f"score(Tensor q, {_CACHE}, {_VISUAL}, {_SCORING}, str backend)"
    " -> (Tensor scores, Tensor mass, Tensor mass_mean, Tensor out)"
)
_define(
    f"select(Tensor scores, Tensor mass, Tensor mass_mean, {_VISUAL}, Tensor? starts,"
    f" Tensor? lengths, SymInt window, {_BUDGET}, str backend)"
    " -> (Tensor indices, Tensor counts)"
)
_define(
    f"attend(Tensor q, {_CACHE}, {_VISUAL}, Tensor indices, Tensor counts, {_MATH}, str backend)"
    " -> Tensor"
)
_define(f"attend_dense(Tensor q, {_CACHE}, {_MATH}, str backend) -> Tensor")


def cache_fields(kv: Cache) -> tuple[Any, ...]:
    """The cache as the schemas take it."""
    if isinstance(kv, PagedKVCache):
        return kv.k_pages, kv.v_pages, kv.block_table, kv.lengths, kv.starts, kv.layout
    return kv.k, kv.v, None, kv.lengths, kv.starts, ""


def visual_fields(visual: VisualTokens) -> tuple[Any, ...]:
    """The visual set as the schemas take it."""
    return visual.spans, visual.offsets, visual.counts, visual.max_count


def _cache(fields: Sequence[Any]) -> Cache:
    k, v, table, lengths, starts, layout = fields
    if table is None:
        return KVCache(k, v, lengths, starts)
    return PagedKVCache(k, v, table, lengths, starts, layout)


def _visual(fields: Sequence[Any]) -> VisualTokens:
    spans, offsets, counts, max_count = fields
    # the size is for checks, which the caller has made
    return VisualTokens(spans, offsets, counts, max_count, size=0)


def _work(device: torch.device) -> workspace.Workspace:
    """Scratch memory of one call on a GPU, of this thread elsewhere.

    A compiled step may run inside the memory pool of a CUDA graph, where torch refuses a tensor
    that outlives it. The price is a launch per op, which zeroes the counters.
    """
    return workspace.Workspace() if device.type == "cuda" else workspace.default(device)


def _new_out(q: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _per_row(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape[0], dtype=dtype, device=like.device)


def _resolve(
    name: str, q: Tensor, kv: Cache, visual: VisualTokens | None, params: Params
) -> Backend:
    return resolve(name, q.device, lambda b: b.refuses(q, kv, visual, params))


def _decode(q: Tensor, *fields: Any) -> tuple[Tensor, ...]:
    kv, visual = _cache(fields[:6]), _visual(fields[6:10])
    scale, softcap, window, tau, score, anchor_output = fields[10:16]
    r_min, r_max, mass_of, k_max, ratio, wanted = fields[16:22]
    params = Params(
        scale, softcap, window, tau, r_min, r_max, mass_of, score, anchor_output, k_max, ratio,
        wanted,
    )  # fmt: skip
    out = _new_out(q)
    backend = _resolve(fields[22], q, kv, visual, params)
    selection = backend.decode(
        q, kv, visual, params, scores=None, out=out, workspace=_work(q.device)
    )
    return out, selection.indices, selection.counts, selection.mass, selection.mass_mean


def _score(q: Tensor, *fields: Any) -> tuple[Tensor, ...]:
    kv, visual = _cache(fields[:6]), _visual(fields[6:10])
    scale, softcap, window, tau, score, anchor_output = fields[10:16]
    params = Params(scale, softcap, window, tau, score=score, anchor_output=anchor_output)
    scores, _, _, out = _score_like(q, *fields)
    backend = _resolve(fields[16], q, kv, visual, params)
    mass, mass_mean = backend.score(
        q,
        kv,
        visual,
        params,
        scores=scores,
        out=out if anchor_output == "dense" else None,
        workspace=_work(q.device),
    )
    return scores, mass, mass_mean, out


def _select(scores: Tensor, mass: Tensor, mass_mean: Tensor, *fields: Any) -> tuple[Tensor, ...]:
    visual = _visual(fields[:4])
    starts, lengths, window, r_min, r_max, mass_of, k_max, ratio, wanted, name = fields[4:]
    params = Params(
        scale=1.0, window=window, r_min=r_min, r_max=r_max, mass_of=mass_of, k_max=k_max,
        ratio=ratio, wanted=wanted,
    )  # fmt: skip
    backend = resolve(name, scores.device, lambda b: b.refuses_select(scores, params))
    selection = backend.select(
        scores,
        mass,
        mass_mean,
        visual,
        params,
        starts=starts,
        lengths=lengths,
        workspace=_work(scores.device),
    )
    return selection.indices, selection.counts


def _attend(q: Tensor, *fields: Any) -> Tensor:
    kv, visual = _cache(fields[:6]), _visual(fields[6:10])
    indices, counts, scale, softcap, window, name = fields[10:]
    mass = _per_row(q, mass_dtype(q))  # followers never look at it
    selection = Selection(indices, counts, mass, mass, trusted=True)
    params = Params(scale, softcap, window)
    backend = _resolve(name, q, kv, visual, params)
    return backend.attend(
        q, kv, visual, selection, params, out=_new_out(q), workspace=_work(q.device)
    )


def _attend_dense(q: Tensor, *fields: Any) -> Tensor:
    kv = _cache(fields[:6])
    *numbers, name = fields[6:]
    params = Params(*numbers)
    backend = _resolve(name, q, kv, None, params)
    return backend.attend(q, kv, None, None, params, out=_new_out(q), workspace=_work(q.device))


def _decode_like(q: Tensor, *fields: Any) -> tuple[Tensor, ...]:
    k_max = fields[19]
    indices = torch.empty((q.shape[0], k_max), dtype=torch.int32, device=q.device)
    dtype = mass_dtype(q)
    return (
        _new_out(q), indices, _per_row(q, torch.int32), _per_row(q, dtype), _per_row(q, dtype)
    )  # fmt: skip


def _score_like(q: Tensor, *fields: Any) -> tuple[Tensor, ...]:
    k, _, table, _, _, layout = fields[:6]
    size = k.shape[2] if table is None else table.shape[1] * k.shape[1 if layout == "NHD" else 2]
    dtype = mass_dtype(q)
    scores = torch.empty((q.shape[0], size), dtype=dtype, device=q.device)
    # the dense output comes with the scores; where none is made the result is empty
    out = _new_out(q) if fields[15] == "dense" else q.new_empty(0)
    return scores, _per_row(q, dtype), _per_row(q, dtype), out


def _select_like(scores: Tensor, *fields: Any) -> tuple[Tensor, ...]:
    k_max = fields[12]
    indices = torch.empty((scores.shape[0], k_max), dtype=torch.int32, device=scores.device)
    return indices, _per_row(scores, torch.int32)


def _out_like(q: Tensor, *fields: Any) -> Tensor:
    return _new_out(q)


_implement: Callable[..., None] = _library.impl
for _name, _run, _fake in (
    ("decode", _decode, _decode_like),
    ("score", _score, _score_like),
    ("select", _select, _select_like),
    ("attend", _attend, _out_like),
    ("attend_dense", _attend_dense, _out_like),
):
    _implement(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"visionpulse::{_name}", _fake, lib=_library)
