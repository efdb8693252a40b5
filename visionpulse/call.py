"""What one call of an op asks for, resolved from a config and the arguments."""

from typing import NamedTuple

from torch import Tensor


class Params(NamedTuple):
    """The numbers of one call, resolved from a config and the arguments of the op."""

    scale: float
    softcap: float = 0.0  # 0 is none
    window: int = 0  # 0 is none
    tau: float = 1.0
    r_min: float = 0.0
    r_max: float = 1.0
    mass_of: str = "max"  # which mass sets the budget
    score: str = "prob"
    anchor_output: str = "pruned"
    k_max: int = 1
    ratio: Tensor | None = None  # float32 [B], stands in for the mass
    wanted: Tensor | None = None  # int32 [B], stands in for the whole budget
