"""Patch what `from_pretrained` returns: for programs that build the model themselves."""

import threading
import warnings
from typing import Any

from ..config import PulseConfig
from ..config import resolve as resolve_config
from .families import UnsupportedModelError, anatomy
from .report import Report
from .session import patch

_lock = threading.Lock()


class _Installed:
    def __init__(self, config: PulseConfig, original: Any) -> None:
        self.config = config
        self.original = original  # the classmethod object that was there
        self.reports: list[Report] = []


_installed: _Installed | None = None


def install(config: PulseConfig | str = "10pct") -> None:
    """Patch every supported model that `from_pretrained` of transformers returns from now on.

    Models without visual tokens pass through; a multimodal model that cannot be patched warns. The
    only function here that changes more than one model; `uninstall` undoes it.
    """
    global _installed
    from transformers import PreTrainedModel

    config = resolve_config(config)
    with _lock:
        if _installed is not None:
            if _installed.config == config:
                return
            raise ValueError(
                f"installed with {_installed.config}, got {config}; call uninstall() first"
            )
        parent: Any = PreTrainedModel
        original = parent.__dict__["from_pretrained"]
        _installed = _Installed(config, original)

        def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
            loaded = original.__func__(cls, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # with loading info
            _patch_loaded(model)
            return loaded

        from_pretrained.__doc__ = original.__func__.__doc__
        parent.from_pretrained = classmethod(from_pretrained)


def uninstall() -> None:
    """Restore `from_pretrained`; models that were patched stay so until they are unpatched."""
    global _installed
    from transformers import PreTrainedModel

    with _lock:
        if _installed is None:
            warnings.warn("visionpulse is not installed", stacklevel=2)
            return
        parent: Any = PreTrainedModel
        parent.from_pretrained = _installed.original
        _installed = None


def installed_reports() -> list[Report]:
    """The reports of all models that `install` has patched, also of those that are gone."""
    return [] if _installed is None else list(_installed.reports)


def _patch_loaded(model: Any) -> None:
    installed = _installed
    if installed is None:
        return
    try:
        anatomy(model)
        session = patch(model, installed.config)
    except UnsupportedModelError as error:
        if "names no visual token" not in str(error):
            warnings.warn(f"not patched: {error}", stacklevel=4)
        return
    if all(report.recorder is not session.recorder for report in installed.reports):
        installed.reports.append(Report(session))
