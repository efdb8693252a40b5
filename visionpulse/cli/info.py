"""`visionpulse info`: what is installed, and which backends can run here."""

import platform
import re
import sys
from collections.abc import Sequence

import torch

from .. import __version__
from ..backends import states
from .parser import parser_of

_WIDEST = 66  # characters of a reason: a line fits 80 columns


def main(argv: Sequence[str] | None = None) -> int:
    """Print the versions, the machine and the state of every backend."""
    parser = parser_of(
        "info", "Print what is installed and which backends can run here.", "visionpulse info -v"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="reasons in full")
    verbose = parser.parse_args(argv).verbose
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"visionpulse {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {threads} {'thread' if threads == 1 else 'threads'}, {gpu}")
    said = states()
    shown = said if verbose else {name: short(state) for name, state in said.items()}
    for name, state in shown.items():
        print(f"  {name:<10} {state}")
    if shown != said:
        print("visionpulse info -v gives the reasons in full")
    return 0


def short(reason: str) -> str:
    """The first clause of a reason, at most a line."""
    clause = re.split(r"[;:\n]", reason, maxsplit=1)[0].strip()
    return clause if len(clause) <= _WIDEST else clause[: _WIDEST - 3] + "..."
