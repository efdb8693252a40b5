"""What the verbs share: one vocabulary of options, one form of error, the exit codes."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ..config import CACHES, PRESETS, PulseConfig, resolve
from ..files import one_line

PRUNING = [name for name, preset in PRESETS.items() if preset.schedule != "dense"]
OUT = "file to write (default: %(default)s)"
EXIT_CODES = "exit codes: 0 done, 1 it failed and says why, 2 wrong options, 130 stopped"


def parser_of(verb: str, about: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example and the exit codes."""
    return argparse.ArgumentParser(
        f"visionpulse {verb}",
        description=about,
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
        formatter_class=_Help,
    )


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that fits 80 columns, its description wrapped, its epilog as written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=79)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def add_preset(
    parser: argparse.ArgumentParser, default: str | None, what: str, names: Iterable[str] = PRESETS
) -> None:
    """Add `--preset`, which takes the same everywhere: a name, or a file."""
    said = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--preset",
        default=default,
        metavar="NAME|FILE",
        help=f"{what}: {', '.join(names)}, or a .json file of `visionpulse calibrate`{said}",
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a verb's own inputs."""
    add = parser.add_argument
    lines = 'JSON lines like {"image": "a.png", "prompt": "..."}; several images as a list'
    add("--data", type=Path, help=lines)
    used, length = "lines of --data to use", "of each dense answer"
    add("--count", type=at_least(1), default=8, help=f"{used} (default: %(default)s)")
    add("--tokens", type=at_least(2), default=128, help=f"{length} (default: %(default)s)")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option: a whole number that is not below `least`."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"wants a whole number from {least} on, got {text!r}")

    return read


def pruning(preset: str) -> PulseConfig:
    """The setting of a `--preset` that has to prune."""
    config = resolve(preset)
    if config.schedule == "dense":
        raise ValueError(
            f"--preset {preset} prunes nothing, which is the side compared with; "
            f"take {', '.join(PRUNING)} or a file"
        )
    return config


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add `--cache`, which changes the setting of `--preset`."""
    parser.add_argument(
        "--cache",
        choices=CACHES,
        help="store keys and values in the model's dtype, or in 8 bits: half the memory",
    )


def failure(verb: str, error: BaseException, code: int = 1) -> int:
    """Say on one line what went wrong; give the exit code."""
    text = one_line(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"cannot use {error.filename}: {error.strerror}"
    print(f"visionpulse {verb}: {text}", file=sys.stderr)
    return code
