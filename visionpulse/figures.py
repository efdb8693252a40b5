"""Figures of matplotlib without a window; the package is optional."""

from typing import Any


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
