"""Figures of matplotlib without a window; the package is optional."""

from os import PathLike
from pathlib import Path
from typing import Any

from .files import replacing


def figure(**options: Any) -> Any:
    """Make an empty figure, or say how to get matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib ({error}): pip install 'visionpulse[plots]'; "
            "trace.to_html(path) and `visionpulse bench --no-plots` need nothing"
        ) from error
    return Figure(layout="constrained", **options)


def save_figure(drawing: Any, path: str | PathLike[str], **metadata: str) -> Path:
    """Draw a figure to a file of the kind that its suffix names."""
    with replacing(path) as temporary:
        drawing.savefig(temporary, dpi=150, metadata=metadata or None)
    return Path(path)
