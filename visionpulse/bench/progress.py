"""The one progress bar: tqdm's, which transformers brings; silent without it or off a terminal."""

import sys
from collections.abc import Callable
from typing import Any

Tick = Callable[[str, int, int], None]


def progress_bar(on: bool = True) -> Tick:
    """`tick(what, done, total)` shows how far a part of the work is; a full bar goes away."""
    try:
        from tqdm import tqdm
    except ImportError:
        on = False
    if not on:
        return lambda what, done, total: None
    bar: Any = None
    label = ""

    def tick(what: str, done: int, total: int) -> None:
        nonlocal bar, label
        if bar is None or what != label:
            if bar is not None:
                bar.close()
            label = what
            # disable=None: drawn only where stderr is a terminal
            bar = tqdm(desc=what, total=total, leave=False, disable=None, file=sys.stderr)
        bar.n = done
        bar.refresh()
        if done >= total:
            bar.close()
            bar = None

    return tick
