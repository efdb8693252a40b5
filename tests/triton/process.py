"""What the two test processes share: their share of the tests, and faults to plant."""

import argparse
import sys

import faults
import pytest


class Share:
    """The i-th of n equal parts of the tests."""

    def __init__(self, i, n):
        self.i, self.n = i, n

    def pytest_collection_modifyitems(self, config, items):
        first, last = (len(items) * j // self.n for j in (self.i, self.i + 1))
        config.hook.pytest_deselected(items=items[:first] + items[last:])
        items[:] = items[first:last]


def run(default):
    """Run pytest, on the default files if none is named.

    `--share i/n` keeps a part of the tests, `--plant name` puts a fault into the kernels.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--plant", choices=faults.FAULTS)
    own, rest = parser.parse_known_args()
    if own.plant:
        faults.plant(own.plant)
    share = Share(*map(int, own.share.split("/")))
    files = [] if any(".py" in argument for argument in rest) else default
    return pytest.main(["-p", "no:cacheprovider", *files, *rest], plugins=[share])
