"""The reference as a backend: any device, any dtype, no speed."""

from torch import Tensor

from .. import reference
from ..cache import Cache
from ..call import Params
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import Workspace
from . import Backend


class ReferenceBackend(Backend):
    """Plain torch; the definition that the others are tested against."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def refuses(
        self, q: Tensor, kv: Cache, visual: VisualTokens | None, params: Params
    ) -> str | None:
        return None

    def refuses_select(self, scores: Tensor, params: Params) -> str | None:
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
        ranked, mass, mass_mean, dense = reference.score(q, kv, visual, params)
        scores.copy_(ranked)
        if out is not None:
            out.copy_(dense)
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
        return reference.select(scores, mass, mass_mean, visual, params, starts, lengths)

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
        return out.copy_(reference.attend(q, kv, visual, selection, params))

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
        result, selection, ranked = reference.decode(q, kv, visual, params)
        out.copy_(result)
        if scores is not None:
            scores.copy_(ranked)
        return selection
