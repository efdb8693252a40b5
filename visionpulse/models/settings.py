"""Settings and results as text: for command lines, model arguments and logs."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from os import PathLike
from typing import Any

from ..config import PulseConfig, resolve
from .session import Session

_PAIRS = ("ratio",)
_NUMBERS = ("tau",)
_INTEGERS = ("refresh",)


def config_of(preset: str, settings: Mapping[str, Any]) -> PulseConfig:
    """A preset with settings given as text: tau=0.3, ratio=0.05:0.10, anchor=8:17.

    Several numbers are joined by a colon, because commas separate arguments in harnesses.
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


class Report:
    """What to say of a session when it is over; it does not keep the model alive."""

    def __init__(self, session: Session) -> None:
        config = session.patched.layer_roles.config
        self.recorder = session.recorder
        self.about = {
            "model": getattr(session.anatomy.model.config, "name_or_path", ""),
            "anchors": list(session.anchors),
            "config": {field.name: str(getattr(config, field.name)) for field in fields(config)},
        }

    def append(self, path: str | PathLike[str], **more: Any) -> None:
        """Add one line of JSON to a log."""
        line = {
            **more,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **self.about,
            **asdict(self.recorder.stats()),
        }
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
