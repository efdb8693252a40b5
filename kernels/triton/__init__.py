"""The decode step as Triton kernels: score, select, attend.

Installed as `visionpulse._triton`; imports torch, triton and itself only. Each module holds kernels
with their launchers; the launchers read host data alone, so a step can be captured in a graph.
"""

from .attend import attend
from .score import dense, scan
from .select import choose, rank

__all__ = ["attend", "choose", "dense", "rank", "scan"]
