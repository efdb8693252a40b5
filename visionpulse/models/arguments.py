"""Finds the arguments of a module's forward, by name or by position, and its cache by any name."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from .kv_layers import has_layers

# transformers 5.24 renamed the first to the second. It still takes the first, but translates it
# inside the forward, behind our hooks.
_CACHE_NAMES = ("past_key_values", "cache")


class Arguments:
    """The signature of a module's forward."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(module.forward).parameters
        self._places = {name: i for i, name in enumerate(parameters)}
        declared = (name for name, p in parameters.items() if "Cache" in str(p.annotation))
        self._cache_names = tuple(dict.fromkeys((*declared, *_CACHE_NAMES)))

    def get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of an argument, or None."""
        if name in kwargs:
            return kwargs[name]
        place = self._places.get(name)
        return args[place] if place is not None and place < len(args) else None

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self._places, args, strict=False)), **kwargs}

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache: the argument of its name or type, else one that has layers; or None."""
        for name in self._cache_names:
            value = self.get(name, args, kwargs)
            if value is not None:
                return value
        return _cache_among((*args, *kwargs.values()))


def cache_of_output(output: Any) -> Any:
    """The cache in the output of a forward or among keywords, by its kind; or None."""
    if isinstance(output, dict):  # outputs of transformers are dicts without what is None
        return _cache_among(output.values())
    return _cache_among(output) if isinstance(output, tuple) else None


def _cache_among(values: Iterable[Any]) -> Any:
    return next((value for value in values if has_layers(value)), None)
