"""`visionpulse calibrate`: suggest anchor, tau and bounds for a model, on your own inputs."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.progress import progress_bar
from ..calibration.suggest import calibrate
from ..data import tiny, trail
from ..files import check_writable, one_line
from .parser import OUT, PRUNING, add_cache, add_inputs, add_preset, failure, parser_of, pruning

TINY = "tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Write a config file that `patch` takes, and print its evidence."""
    example = "visionpulse calibrate Qwen/Qwen3-VL-4B-Instruct --data prompts.jsonl"
    parser = parser_of("calibrate", main.__doc__ or "", example)
    parser.add_argument("model", help=f"folder or name for from_pretrained, or {TINY!r}")
    add_inputs(parser)
    add_preset(parser, None, "a setting to compare with", names=PRUNING)
    add_cache(parser)
    parser.add_argument("--out", type=Path, default=Path("visionpulse.json"), help=OUT)
    parser.add_argument("--plot", type=Path, help="draw error against retention")
    args = parser.parse_args(argv)
    if args.model != TINY and args.data is None:
        parser.error("--data is needed: a model is calibrated on inputs like those it will serve")
    try:
        start = None if args.preset is None else pruning(args.preset)
    except ValueError as error:
        return failure("calibrate", error, 2)
    try:
        check_writable(args.out.parent)
        model, inputs = _tiny(args.count) if args.model == TINY else loaded(args)
        calibration = calibrate(
            model, inputs, start=start, cache=args.cache, max_new_tokens=args.tokens,
            tick=progress_bar(),
        )  # fmt: skip
    except (ImportError, OSError, ValueError) as error:
        return failure("calibrate", error)
    print(f"{calibration.report()}\n")
    if args.plot:
        print(f"The plot is in {calibration.plot(args.plot)}.")
    out = calibration.save(args.out)
    print(f'The setting is in {out}: use it as\nvp.patch(model, "{out}") or --preset {out}')
    return 0


def _tiny(count: int) -> tuple[Any, list[Any]]:
    drawn = trail.test_set(11, 4 * count, tiny.SIDE, "crowded")
    batches = [tiny.inputs_of(drawn[i : i + 4]) for i in range(0, len(drawn), 4)]
    return tiny.load(), batches


def loaded(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The model of `--model`, and the inputs of the lines of `--data`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    models: Any = AutoModelForImageTextToText
    processors: Any = AutoProcessor
    model = models.from_pretrained(args.model, dtype="auto").eval()
    processor = processors.from_pretrained(args.model)
    lines = args.data.read_text().splitlines()[: args.count]
    items = [_item(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return model, list(prompts(processor, items, args.data.parent))


def _item(number: int, line: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} of --data is no JSON: {one_line(error)}") from error
    if not isinstance(item, dict):
        raise ValueError(f"line {number} of --data needs 'image' and 'prompt', got {line[:60]}")
    return item


def prompts(
    processor: Any, items: Sequence[Mapping[str, Any]], folder: Path
) -> Iterator[Mapping[str, Any]]:
    """The inputs of `generate` for lines of --data; picture paths are relative to the file."""
    for number, item in enumerate(items, 1):
        if "prompt" not in item or "image" not in item:
            raise ValueError(f"line {number} needs 'image' and 'prompt', got {sorted(item)}")
        images = item["image"] if isinstance(item["image"], list) else [item["image"]]
        content = [{"type": "image", "image": str(folder / image)} for image in images]
        content.append({"type": "text", "text": item["prompt"]})
        yield processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
