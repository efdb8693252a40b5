"""`visionpulse demo`: a drawn picture answered dense and with VisionPulse, side by side."""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import resolve as resolve_config
from ..data import tiny, trail
from ..files import check_writable
from ..models import Session, patch
from ..trace.layout import PictureGrid
from .parser import add_preset, failure, parser_of

MOST_TOKENS = 64
ROUNDS = 5  # dense and sparse in turn, so that a busy machine is busy for both


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when the page was written."""
    about = "Answer a drawn picture dense and with VisionPulse, side by side."
    parser = parser_of("demo", about, "visionpulse demo --preset 5pct --out demo.html")
    add_preset(parser, "5pct", "the setting to show")
    parser.add_argument("--seed", type=int, default=9, help="another picture and question")
    parser.add_argument("--pictures", type=int, default=50, help="how many to check at the end")
    parser.add_argument("--out", type=Path, default=Path("visionpulse-demo.html"))
    args = parser.parse_args(argv)
    begun = time.monotonic()
    try:
        config = resolve_config(args.preset)
    except ValueError as error:
        return failure("demo", error, 2)
    try:
        check_writable(args.out.parent)
        model = _quietly(tiny.load)
    except (ImportError, OSError) as error:
        return failure("demo", error)
    drawn = trail.test_set(args.seed, max(1, args.pictures), tiny.SIDE, "crowded")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a step is not worth a second one
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        session = stack.enter_context(patch(model, config, record=True))
        _show_one(model, session, drawn[0], args.preset, args.out)
        _count_right(model, session, drawn)
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    return 0


def _quietly(make: Any) -> Any:
    """Load without the progress bars of transformers."""
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        log: Any = logging
        log.disable_progress_bar()
        log.set_verbosity_error()
    return make()


def _answer(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    out = model.generate(**inputs, do_sample=False, max_new_tokens=MOST_TOKENS)
    return [tiny.until_end(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]


def _show_one(
    model: Any,
    session: Session,
    drawn: tuple[trail.Picture, trail.Question],
    preset: str,
    out: Path,
) -> None:
    """Answer one picture both ways, token by token, and write the page."""
    picture, question = drawn
    inputs = tiny.inputs_of([drawn])
    n = picture.side**2
    print(f"a picture of {picture.side} x {picture.side} glyphs, {n} visual tokens")
    print(f"question: {' '.join(trail.words(question.prompt))}\n")
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    dense: list[int] = []
    for turn in range(ROUNDS):
        with session.paused(), tiny.Clock(model) as clock:
            (dense,) = _answer(model, inputs)
        seconds["dense"] += clock.seconds
        session.reset_stats()
        with tiny.Clock(model) as clock:
            (sparse,) = _answer(model, inputs)
        seconds["sparse"] += clock.seconds
        if turn == 0:  # the first steps build what later ones reuse
            seconds = {name: [] for name in seconds}
    rows = list(session.trace)
    _table(dense, sparse, question.answer, n, rows)
    kept = np.array([len(row.kept) for row in rows]) / n
    print(f"\nvisual tokens kept: {100 * kept.mean():.2f} % on average, "
          f"{100 * kept.min():.2f} % to {100 * kept.max():.2f} %")  # fmt: skip
    times = {name: 1e3 * float(np.median(taken)) for name, taken in seconds.items()}
    print(
        f"time per step here: dense {times['dense']:.2f} ms, VisionPulse {times['sparse']:.2f} ms, "
        f"ratio {times['dense'] / times['sparse']:.2f}\n"
        f"  (one thread; with {n} visual tokens and 1.6 M parameters a step is mostly Python:\n"
        "   `visionpulse bench` times the attention of large models)"
    )
    note = " ".join(trail.words(question.prompt)) + f" · preset {preset}"
    session.trace.to_html(
        out, title="VisionPulse demo", note=note,
        pictures=[PictureGrid(picture.side, picture.side, picture.pixels, "the picture")],
        tokenizer=lambda token: trail.words([token])[0],
    )  # fmt: skip
    print(f"step by step, to look at: {out}")


def _table(
    dense: Sequence[int], sparse: Sequence[int], answer: Sequence[int], n: int, rows: Sequence[Any]
) -> None:
    """Print both answers; a decode step writes the token after the one it reads."""
    print(f"  {'dense':<9}{'VisionPulse':<13}{'kept of ' + str(n):<13}mass")
    for i in range(max(len(dense), len(sparse))):
        words = [
            trail.words([tokens[i]])[0] if i < len(tokens) else "" for tokens in (dense, sparse)
        ]
        mark = " " if i < len(answer) and words == trail.words([answer[i]]) * 2 else "!"
        line = f"{mark} {words[0]:<9}{words[1]:<13}"
        if i == 0:
            line += "(prefill, dense)"
        elif i <= len(rows) and i < len(sparse):
            step = rows[i - 1]
            line += f"{len(step.kept):<13}{step.mass:.2f} {'#' * round(20 * step.mass)}"
        print(line.rstrip())
    for name, tokens in (("dense", dense), ("VisionPulse", sparse)):
        print(f"{name}: {'right' if list(tokens) == list(answer) else 'wrong'}")


def _count_right(
    model: Any, session: Session, drawn: Sequence[tuple[trail.Picture, trail.Question]]
) -> None:
    """Count right answers over many pictures."""
    inputs = tiny.inputs_of(drawn)
    expected = [question.answer for _, question in drawn]
    right = {}
    with session.paused():
        right["dense"] = _answer(model, inputs)
    session.reset_stats()
    right["VisionPulse"] = _answer(model, inputs)
    counts = {
        name: sum(a == b for a, b in zip(answers, expected, strict=True))
        for name, answers in right.items()
    }
    print(f"\n{len(drawn)} pictures, answered without a mistake: "
          + ", ".join(f"{name} {count}" for name, count in counts.items()))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
