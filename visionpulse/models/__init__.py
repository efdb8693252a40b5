"""Patching models of transformers: `patch` makes a session, `unpatch` ends it."""

from typing import Any

from torch import Tensor

from .. import ops
from ..backends import Choice
from ..trace.record import Trace
from .explain import ModelExplanation, explain_model
from .families import UnsupportedModelError
from .install import install, uninstall
from .session import Session, patch, session_of, set_visual_mask, unpatch

__all__ = [
    "ModelExplanation",
    "Session",
    "Trace",
    "UnsupportedModelError",
    "explain",
    "explain_model",
    "install",
    "patch",
    "session_of",
    "set_visual_mask",
    "uninstall",
    "unpatch",
]


def explain(subject: Any, *args: Any, **kwargs: Any) -> "Choice | ModelExplanation":
    """Explain a call, `explain(q, kv, visual, config)`, or a model, `explain(model)`."""
    if isinstance(subject, Tensor):
        return ops.explain(subject, *args, **kwargs)
    return explain_model(subject, *args, **kwargs)
