"""The decode step as Triton kernels: score, select, attend.

Installed as `visionpulse._triton`; imports torch, triton and itself only. A module holds one kernel
and its launchers, which read host data alone: so a step can be captured in a graph.
"""

from .attend import attend
from .score import dense, score
from .select import finish_scores, select, select_by_logits

__all__ = ["attend", "dense", "finish_scores", "score", "select", "select_by_logits"]
