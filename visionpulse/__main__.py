"""The command line: `visionpulse <verb>`, the same as `python -m visionpulse <verb>`."""

import argparse
import importlib
import platform
import sys
from collections.abc import Callable, Sequence

Verb = Callable[[Sequence[str]], int]


def info(argv: Sequence[str]) -> int:
    """Say what is installed and which backends can run here."""
    argparse.ArgumentParser("visionpulse info", description=info.__doc__).parse_args(argv)
    import torch

    from . import __version__, backends

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"visionpulse {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}")
    for name, state in backends().items():
        print(f"  {name:<10} {state}")
    return 0


def _later(module: str) -> Verb:
    """A verb that lives in a module of its own, imported when it is asked for."""

    def run(argv: Sequence[str]) -> int:
        main = importlib.import_module(f".{module}", __package__).main
        return int(main(argv) or 0)

    return run


# verb: (what runs it, what it is for)
VERBS: dict[str, tuple[Verb, str]] = {
    "info": (info, "what is installed, and which backends can run here"),
    "demo": (_later("cli.demo"), "a picture answered dense and with VisionPulse, side by side"),
    "run": (_later("cli.run"), "a program, with every model that it loads patched"),
    "calibrate": (
        _later("cli.calibrate"),
        "anchor, tau and bounds for a model, from your own inputs",
    ),
    "plot": (_later("cli.plot"), "a saved trace, drawn again without the model"),
    "bench": (_later("cli.bench"), "what you would gain on this machine, for a model's config"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb."""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    usage = f"usage: visionpulse <verb> [options]\n\n{lines}\n\nvisionpulse <verb> --help says more"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv[0] not in VERBS:
        print(f"visionpulse: no verb {argv[0]!r}\n{usage}", file=sys.stderr)
        return 2
    return VERBS[argv[0]][0](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
