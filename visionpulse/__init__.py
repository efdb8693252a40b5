"""Dynamic visual sparsity for multimodal decoding: VisionPulse as one fast decode-step op."""

from typing import TYPE_CHECKING, Any

from . import cpu
from .backends import BackendUnavailableError
from .budgets import Fixed, Random, TopK, TopP
from .budgets import register as register_budget
from .cache import KVCache, PagedKVCache
from .config import PRESETS, PulseConfig, load_config
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
from .selection import Selection
from .visual import VisualTokens
from .workspace import Workspace

if TYPE_CHECKING:
    from .calibration.suggest import calibrate

    def backends() -> dict[str, str]:
        """Each backend with "available", or the reason why it cannot run on this machine."""
        ...
else:
    from . import backends  # the package itself, which may be called: else it were shadowed

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
    "calibrate",
    "cpu",
    "decode",
    "explain",
    "install",
    "load_config",
    "patch",
    "register_budget",
    "score",
    "select",
    "set_visual_mask",
    "uninstall",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    # tools for people at a desk are imported when they are asked for
    if name == "calibrate":
        from .calibration.suggest import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
