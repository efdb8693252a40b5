"""`visionpulse calibrate`: suggest anchor, tau and bounds for a model, on your own inputs."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.progress import progress_bar
from ..calibration.suggest import calibrate
from ..config import PRESETS
from ..data import tiny, trail

TINY = "tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Write a config file that `patch` takes, and print its evidence."""
    parser = argparse.ArgumentParser("visionpulse calibrate", description=main.__doc__)
    parser.add_argument("model", help=f"folder or name for from_pretrained, or {TINY!r}")
    parser.add_argument(
        "--data", type=Path,
        help='JSON lines like {"image": "a.png", "prompt": "..."}; several images as a list',
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=8, help="lines of --data to use")
    parser.add_argument("--tokens", type=int, default=128, help="of each dense answer")
    parser.add_argument("--start", choices=sorted(PRESETS), help="a preset to compare with")
    parser.add_argument("--out", type=Path, default=Path("visionpulse.json"))
    parser.add_argument("--plot", type=Path, help="draw error against retention")
    args = parser.parse_args(argv)
    if args.model != TINY and args.data is None:
        parser.error("--data is needed: a model is calibrated on inputs like those it will serve")
    try:
        model, inputs, options = _tiny(args.count) if args.model == TINY else _loaded(args)
        calibration = calibrate(
            model, inputs, start=PRESETS.get(args.start), max_new_tokens=args.tokens,
            tick=progress_bar(), **options,
        )  # fmt: skip
    except (ImportError, OSError, ValueError) as error:
        print(f"visionpulse calibrate: {error}", file=sys.stderr)
        return 1
    print(f"{calibration.report()}\n\nwritten: {calibration.save(args.out)}")
    if args.plot:
        print(f"drawn: {calibration.plot(args.plot)}")
    return 0


def _tiny(count: int) -> tuple[Any, list[Any], dict[str, Any]]:
    drawn = trail.test_set(11, 4 * count, tiny.SIDE, "crowded")
    batches = [tiny.inputs_of(drawn[i : i + 4]) for i in range(0, len(drawn), 4)]
    return tiny.load(), batches, {}


def _loaded(args: argparse.Namespace) -> tuple[Any, list[Any], dict[str, Any]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    models: Any = AutoModelForImageTextToText
    processors: Any = AutoProcessor
    model = models.from_pretrained(args.model, dtype="auto").eval()
    processor = processors.from_pretrained(args.model)
    lines = args.data.read_text().splitlines()[: args.count]
    items = [json.loads(line) for line in lines if line.strip()]
    return model, list(prompts(processor, items, args.data.parent)), {}


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
