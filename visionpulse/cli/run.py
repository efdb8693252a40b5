"""`visionpulse run`: run a program in which every model that it loads is patched."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ..files import check_writable
from ..models.config_text import config_from_text
from ..models.install import install, installed_reports, uninstall
from .parser import add_cache, add_preset, failure, parser_of

LOG = "visionpulse-retention.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "run",
        "Run a Python program with every model of transformers patched on loading. "
        "Its exit code is the program's.",
        "visionpulse run --preset 5pct -- run.py --data MMStar",
    )
    add_preset(parser, "10pct", "the setting")
    add_cache(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of PulseConfig, repeatable: tau=0.3, ratio=0.05:0.10, anchor=17",
    )
    parser.add_argument("--log", default=LOG, help=f"file to add retention to (default: {LOG})")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module by its name")
    parser.add_argument("program", help="script, or module with -m; put -- before it")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Install, run the program as __main__, log what was kept."""
    parser = _parser()
    options = parser.parse_args(argv)
    settings = dict(item.partition("=")[::2] for item in options.set)
    if options.cache is not None:
        settings["cache"] = options.cache
    try:
        config = config_from_text(options.preset, settings)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    log = Path(options.log).resolve()  # the program may change the working directory
    try:
        if not options.module and not Path(options.program).exists():
            raise ValueError(f"no script {options.program!r}; with -m a module is run by its name")
        check_writable(log.parent)
    except (OSError, ValueError) as error:
        return failure("run", error)
    before = sys.argv, sys.path[:]
    install(config)
    try:
        sys.argv = [options.program, *options.args]
        if options.module:
            sys.path.insert(0, "")
            runpy.run_module(options.program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(options.program).resolve().parent))
            runpy.run_path(options.program, run_name="__main__")
    except ImportError as error:
        if not (options.module and _began_nothing(error.__traceback__)):
            raise
        way_out = "without -m a script is run by its path"
        return failure("run", ValueError(f"cannot run {options.program!r}: {error}; {way_out}"))
    finally:
        sys.argv, sys.path[:] = before
        for report in installed_reports():
            report.append(log, program=options.program)
            print(f"visionpulse: {report.recorder.stats()}; logged to {log}", file=sys.stderr)
        uninstall()
    return 0


def _began_nothing(trace: TracebackType | None) -> bool:
    """Whether an error comes from the search for a module, before any of the program's lines."""
    while trace is not None:
        if trace.tb_frame.f_globals["__name__"] not in (__name__, "runpy"):
            return False
        trace = trace.tb_next
    return True
