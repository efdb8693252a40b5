"""The compiled module: loaded once, at the first use, and the reason kept when it cannot be."""

from functools import cache
from types import ModuleType


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from . import _C
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); run: pip install -e ."
    return _C, None


def failure() -> str | None:
    """Why the compiled module cannot be used, or None."""
    return _load()[1]


def module() -> ModuleType:
    """The compiled module; call only where `failure()` is None."""
    loaded, reason = _load()
    if loaded is None:
        raise ImportError(reason)
    return loaded
