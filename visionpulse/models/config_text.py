"""A config from text: for command lines and the model arguments of evaluation programs."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..config import PulseConfig, resolve

_PAIRS = ("ratio",)
_NUMBERS = ("tau",)
_INTEGERS = ("refresh",)


def config_from_text(preset: str, settings: Mapping[str, Any]) -> PulseConfig:
    """A preset changed by settings in text: tau=0.3, ratio=0.05:0.10, anchor=8:17.

    A colon joins several numbers, because a comma separates arguments in evaluation programs.
    """
    known = {field.name for field in fields(PulseConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return resolve(preset).updated(**{k: _value(k, v) for k, v in settings.items()})


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if name in _PAIRS:
            return tuple(float(part) for part in value.split(":"))
        if name in _NUMBERS:
            return float(value)
        if name in _INTEGERS:
            return int(value)
        if name == "anchor":
            return None if value == "None" else tuple(int(part) for part in value.split(":"))
    except ValueError as error:
        raise ValueError(
            f"cannot read {name}={value!r}; numbers are joined by a colon, like ratio=0.05:0.10"
        ) from error
    return value
