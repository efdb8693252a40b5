"""The compiled module, loaded once at its first use; if that fails, the reason."""

import hashlib
import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_ROOT = Path(__file__).resolve().parent.parent  # has the C++ sources in a checkout only
_UNNAMED = "csrc/cpu/bind.h:none"  # of a module that was built before it named its binding


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        loaded = importlib.import_module("._C", __package__)
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); run: pip install -e ."
    if name := _changed(loaded):
        reason = f"the compiled module was built with another {name}"
        return None, f"{reason}; its calls do not fit, run: pip install -e ."
    try:
        loaded.cpu.read_tensors_of(torch.Tensor)
    except (AttributeError, RuntimeError) as error:
        reason = f"torch {torch.__version__} does not show its tensors by DLPack 1 ({error})"
        return None, f"{reason}; install a release that does: pip install 'torch>=2.11,<3'"
    return loaded, None


def _changed(loaded: ModuleType) -> str | None:
    """A source of the binding that is not the one the module was built from."""
    for built in getattr(loaded, "binding", _UNNAMED).split():
        name, digest = built.split(":")
        source = _ROOT / name
        if source.is_file() and hashlib.sha256(source.read_bytes()).hexdigest() != digest:
            return str(name)
    return None


def failure() -> str | None:
    """Say why the compiled module cannot be used, or return None."""
    return _load()[1]


def module() -> ModuleType:
    """Return the compiled module; call only where `failure()` is None."""
    loaded, reason = _load()
    if loaded is None:
        raise ImportError(reason)
    return loaded
