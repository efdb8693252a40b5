"""`visionpulse acceptance`: would lossless decoding pay, on your own inputs and this machine."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..bench.progress import progress_bar
from ..bench.rows import Machine
from ..calibration.acceptance import measure_acceptance
from ..data import tiny, trail
from ..files import check_writable
from .bench import threads_of
from .calibrate import TINY, loaded
from .parser import OUT, PRUNING, add_inputs, add_preset, failure, parser_of, pruning

KindsOf = Callable[[int, list[int]], Sequence[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure how many drafted tokens the dense model would accept, and what rounds cost here."""
    example = "visionpulse acceptance --model Qwen/Qwen3-VL-4B-Instruct --data prompts.jsonl"
    parser = parser_of("acceptance", main.__doc__ or "", example)
    add = parser.add_argument
    add("--model", required=True, help=f"folder or name for from_pretrained, or {TINY!r}")
    add_inputs(parser)
    add_preset(parser, "10pct", "the setting that drafts", names=PRUNING)
    add("--out", type=Path, default=Path("visionpulse-acceptance.json"), help=OUT)
    args = parser.parse_args(argv)
    if args.model != TINY and args.data is None:
        parser.error("--data is needed: acceptance is that of inputs like those you will serve")
    try:
        config = pruning(args.preset)
    except ValueError as error:
        return failure("acceptance", error, 2)
    torch.set_num_threads(threads_of(Machine.here().load))
    try:
        check_writable(args.out.parent)
        kinds_of = None
        if args.model == TINY:
            model, inputs, kinds_of = _tiny(args)
        else:
            model, inputs = loaded(args)
        report = measure_acceptance(
            model, inputs, config, max_new_tokens=args.tokens, kinds_of=kinds_of,
            tick=progress_bar(),
        )  # fmt: skip
    except (ImportError, OSError, ValueError) as error:
        return failure("acceptance", error)
    print(report)
    print(f"\nThe numbers are in {report.save(args.out)}.")
    return 0


def _tiny(args: argparse.Namespace) -> tuple[object, list[dict[str, object]], KindsOf]:
    drawn = trail.test_set(12, args.count, tiny.SIDE, "crowded")

    def kinds_of(number: int, answer: list[int]) -> list[str]:
        return drawn[number][1].kinds_of(answer)

    return tiny.load(), [tiny.inputs_of([pair]) for pair in drawn], kinds_of
