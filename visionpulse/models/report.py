"""What a session did, as a line of a log."""

import json
import time
from dataclasses import asdict
from os import PathLike
from typing import Any

from ..config import config_data
from ..files import append_line
from .session import Session


class Report:
    """What a log says of a session, also when its model is gone: it keeps no model alive."""

    def __init__(self, session: Session) -> None:
        config = session.patched.layer_roles.config
        self.recorder = session.recorder
        self.about = {
            "model": getattr(session.anatomy.model.config, "name_or_path", ""),
            "anchors": list(session.anchors),
            "config": config_data(config),
        }

    def append(self, path: str | PathLike[str], **more: Any) -> None:
        """Add one line of JSON to a log."""
        line = {
            **more,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **self.about,
            **asdict(self.recorder.stats()),
        }
        append_line(path, json.dumps(line))
