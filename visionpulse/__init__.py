"""Dynamic visual sparsity for multimodal decoding: VisionPulse as one fast decode-step op."""

from .backends import BackendUnavailableError, backends
from .budgets import Fixed, Random, TopK, TopP
from .budgets import register as register_budget
from .config import PRESETS, PulseConfig
from .ops import attend, decode, explain, score, select
from .structs import KVCache, PagedKVCache, Selection, VisualTokens
from .workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BackendUnavailableError",
    "Fixed",
    "KVCache",
    "PagedKVCache",
    "PulseConfig",
    "Random",
    "Selection",
    "TopK",
    "TopP",
    "VisualTokens",
    "Workspace",
    "attend",
    "backends",
    "decode",
    "explain",
    "register_budget",
    "score",
    "select",
]
