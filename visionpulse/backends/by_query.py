"""Several queries of a row on kernels of one query: K and V are read again for each."""

from collections.abc import Callable

from torch import Tensor

from ..call import Call, Scored
from ..queries import call_as_rows, scored_as_rows
from ..selection import Selection
from . import Backend


class ByQuery(Backend):
    """Another backend, handed every query as a row of its own, in one call."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]

    def score(self, call: Call) -> tuple[Scored, Tensor | None]:
        scored, out = self.inner.score(call_as_rows(call))
        return scored, None if out is None else _shaped(out, call)

    def select(self, scored: Scored) -> Selection:
        return self.inner.select(scored_as_rows(scored))

    def attend(self, call: Call) -> Tensor:
        return _shaped(self.inner.attend(call_as_rows(call)), call)

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        out, selection = self.inner.decode(call_as_rows(call))
        return _shaped(out, call), selection

    def staged(
        self, call: Call, between: Callable[[Scored], Scored] | None = None
    ) -> tuple[Tensor, Selection]:
        out, selection = self.inner.staged(call_as_rows(call), between)
        return _shaped(out, call), selection


def _shaped(out: Tensor, call: Call) -> Tensor:
    """The output [B * Q, H, D] as [B, Q, H, D], in the caller's tensor if there is one."""
    if call.out is None:
        return out.view(call.q.shape)
    if out.data_ptr() != call.out.data_ptr():
        call.out.copy_(out.view(call.q.shape))
    return call.out


def fitted(backend: Backend, queries: int | None) -> Backend:
    """The backend for calls of so many queries a row; None is a call without that axis."""
    if queries is None or 1 < queries <= backend.max_queries:
        return backend
    return ByQuery(backend)
