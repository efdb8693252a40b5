"""How the two test processes run pytest: on a part of the tests, and with a planted fault."""

import argparse
import gc
import os
import sys

import faults
import pytest


class Share:
    """Every n-th test from the i-th on: neighbours cost much the same, so the parts do too."""

    def __init__(self, i, n):
        self.i, self.n = i, n

    def pytest_collection_modifyitems(self, config, items):
        mine = items[self.i :: self.n]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine


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
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is used here, and they load slowly
    gc.freeze()  # modules stay loaded, so the collector need not visit them
    return pytest.main(["-p", "no:cacheprovider", *files, *rest], plugins=[share])
