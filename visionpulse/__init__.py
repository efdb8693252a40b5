"""Dynamic visual sparsity for multimodal decoding: VisionPulse as one fast decode-step op."""

from .backends import BackendUnavailableError, backends
from .budgets import Fixed, Random, TopK, TopP
from .budgets import register as register_budget
from .config import PRESETS, PulseConfig
from .models import (
    Session,
    Trace,
    UnsupportedModelError,
    explain,
    install,
    patch,
    set_visual_mask,
    uninstall,
    unpatch,
)
from .ops import attend, decode, score, select
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
    "Session",
    "TopK",
    "TopP",
    "Trace",
    "UnsupportedModelError",
    "VisualTokens",
    "Workspace",
    "attend",
    "backends",
    "decode",
    "explain",
    "install",
    "patch",
    "register_budget",
    "score",
    "select",
    "set_visual_mask",
    "uninstall",
    "unpatch",
]
