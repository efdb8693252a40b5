"""The command line: one module a verb, imported when the verb is asked for."""

import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .parser import EXIT_CODES, failure

# verb, its module's name with dashes: what it is for
VERBS = {
    "info": "what is installed, and which backends can run here",
    "demo": "a picture answered dense and with VisionPulse, side by side",
    "run": "a program, with every model that it loads patched",
    "calibrate": "anchor, tau and bounds for a model, from your own inputs",
    "acceptance": "whether lossless decoding would pay, from your own inputs",
    "plot": "a saved trace, drawn again without the model",
    "serve-check": "whether a serving engine can run it, and what it would do",
    "bench": "what you would gain on this machine, for a model's config",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb."""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    usage = (
        f"usage: visionpulse <verb> [options]\n\n{lines}\n\n"
        f"visionpulse <verb> --help says more, with an example\n{EXIT_CODES}"
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv[0] == "--version":
        print(f"visionpulse {__version__}")
        return 0
    if argv[0] not in VERBS:
        print(f"visionpulse: no verb {argv[0]!r}\n{usage}", file=sys.stderr)
        return 2
    verb = importlib.import_module(f".{argv[0].replace('-', '_')}", __name__)
    try:
        return int(verb.main(argv[1:]))
    except KeyboardInterrupt:
        print(f"visionpulse {argv[0]}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough; Python's own flush at exit would say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if argv[0] == "run":  # the program's own error, with its own traceback
            raise
        return failure(argv[0], error)
