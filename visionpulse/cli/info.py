"""`visionpulse info`: what is installed, and which backends can run here."""

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

from .. import __version__
from ..backends import states


def main(argv: Sequence[str] | None = None) -> int:
    """Print the versions, the machine and the state of every backend."""
    argparse.ArgumentParser("visionpulse info", description=__doc__).parse_args(argv)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"visionpulse {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}")
    for name, state in states().items():
        print(f"  {name:<10} {state}")
    return 0
