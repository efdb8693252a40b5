"""The reference as a backend: any device, any dtype, no speed."""

from torch import Tensor

from .. import reference
from ..call import Call, Scored, filled
from ..selection import Selection
from . import Backend


class ReferenceBackend(Backend):
    """Plain torch; the definition that the others are tested against."""

    name = "reference"
    reads_float8 = True

    def score(self, call: Call) -> tuple[Scored, Tensor | None]:
        scored, dense = reference.score(call)
        if call.scores is not None:
            scored = scored._replace(scores=call.scores.copy_(scored.scores))
        if call.selected is not None:
            mass, mass_mean = call.new_masses()
            scored = scored._replace(
                mass=mass.copy_(scored.mass), mass_mean=mass_mean.copy_(scored.mass_mean)
            )
        return scored, call.new_out().copy_(dense) if call.is_dense else None

    def select(self, scored: Scored) -> Selection:
        return filled(scored.selected, reference.select(scored))

    def attend(self, call: Call) -> Tensor:
        return call.new_out().copy_(reference.attend(call))

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        out, selection, scores = reference.decode(call)
        if call.scores is not None:
            call.scores.copy_(scores)
        return call.new_out().copy_(out), filled(call.selected, selection)
