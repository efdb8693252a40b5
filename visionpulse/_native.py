"""The compiled module, loaded once at its first use; if that fails, the reason."""

import importlib
from functools import cache
from types import ModuleType


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("._C", __package__), None
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); run: pip install -e ."


def failure() -> str | None:
    """Say why the compiled module cannot be used, or return None."""
    return _load()[1]


def module() -> ModuleType:
    """Return the compiled module; call only where `failure()` is None."""
    loaded, reason = _load()
    if loaded is None:
        raise ImportError(reason)
    return loaded
