"""The tiny model and what it takes: weights that were trained by benchmarks/accuracy/train.py."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import trail

FOLDER = Path(__file__).resolve().parent / "tiny"
SIDE = 20  # cells a side of the largest pictures it was trained on: 400 visual tokens


def load(folder: Path = FOLDER) -> Any:
    """Load the model in float32, from the package's own files."""
    try:
        from transformers import AutoModelForImageTextToText
    except ImportError as error:
        raise ImportError(
            "the tiny model runs in transformers, which is not installed: "
            "pip install 'visionpulse[transformers]'"
        ) from error
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no weights in {folder}; make them with benchmarks/accuracy/train.py --out {folder}"
        )
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def inputs_of(drawn: Sequence[tuple[trail.Picture, trail.Question]]) -> dict[str, Any]:
    """What `model.generate` takes, for pictures of one size."""
    side = drawn[0][0].side
    ids = torch.tensor([trail.prefix(side) + question.prompt for _, question in drawn])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == trail.IMAGE).int(),
        "pixel_values": torch.from_numpy(trail.patches([picture for picture, _ in drawn])),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(drawn)),
    }


def until_end(tokens: Sequence[int]) -> list[int]:
    """An answer up to its END, with it."""
    answer = list(tokens)
    return answer[: answer.index(trail.END) + 1] if trail.END in answer else answer


class Clock:
    """Times every decode step of a model: the whole forward, language head included."""

    def __init__(self, model: Any) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, with_kwargs=True),
        ]

    def _begin(self, module: Any, args: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            self.seconds.append(time.perf_counter() - self._begun)

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
