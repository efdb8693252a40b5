"""`visionpulse demo`: a drawn picture answered dense and with VisionPulse, side by side."""

import contextlib
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bench import long_context
from ..bench.progress import progress_bar
from ..config import PulseConfig
from ..data import tiny, trail
from ..files import check_writable
from ..models import Session, patch
from ..trace.layout import PictureGrid
from .parser import OUT, PRUNING, add_cache, add_preset, at_least, failure, parser_of, pruning

MOST_TOKENS = 64
PICTURES, EACH = 8, 4096  # of the long context that is timed, and visual tokens of each
ROUNDS = 5  # dense and sparse in turn, so that a busy machine is busy for both


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when the page was written."""
    about = "Answer a drawn picture dense and with VisionPulse, side by side."
    parser = parser_of("demo", about, "visionpulse demo --preset 5pct --out demo.html")
    add_preset(parser, "5pct", "the setting to show", names=PRUNING)
    add_cache(parser)
    parser.add_argument("--seed", type=at_least(0), default=9, help="another picture and question")
    parser.add_argument(
        "--pictures", type=at_least(1), default=50, help="how many to check at the end"
    )
    parser.add_argument("--out", type=Path, default=Path("visionpulse-demo.html"), help=OUT)
    args = parser.parse_args(argv)
    begun = time.monotonic()
    try:
        config = pruning(args.preset)
        if args.cache is not None:
            config = config.updated(cache=args.cache)
    except ValueError as error:
        return failure("demo", error, 2)
    try:
        check_writable(args.out.parent)
        model = _quietly(tiny.load)
    except (ImportError, OSError) as error:
        return failure("demo", error)
    drawn = trail.test_set(args.seed, args.pictures, tiny.SIDE, "crowded")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a step is not worth a second one
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        session = stack.enter_context(patch(model, config, record=True))
        times = _long_context(config)
        _show_one(model, session, drawn[0], args.preset, args.out, times)
        _count_right(model, session, drawn)
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    return 0


LEGEND = (
    "Every cell is one visual token: a glyph on its left half, above right the glyph it points to, "
    "below right one of four marks.",
    "HAS names the marks found on all cells of a glyph, SUM adds their numbers up (the last digit "
    "counts), TO names the next glyph.",
)


def _in_words(question: trail.Question) -> str:
    """The question as a person would ask it."""
    colour, glyph = trail.words(question.prompt)[-2:]
    return (
        f"Start at the {colour} glyph {glyph}. Which marks has it, what is their sum so far, and "
        "where does it point? Go on there, until STOP."
    )


def _long_context(config: PulseConfig) -> dict[str, Any]:
    """Time what the tiny model is too small for, print it, and make the page's part of it."""
    tick = progress_bar(True)
    tick("attention of a large model", 0, 1)
    seconds = long_context.step_seconds(config, PICTURES * EACH)
    tick("attention of a large model", 1, 1)
    rows = [(name, round(1e3 * taken, 1)) for name, taken in seconds.items()]
    (_, as_called), *compared = rows
    title = f"Where time is won: {PICTURES} large pictures, {PICTURES * EACH:,} visual tokens"
    about = (
        f"All attention of one decode step of a model shaped like {long_context.MODEL}: "
        f"{100 * config.ratio[1]:g} % of the visual tokens kept, random keys, bf16, one thread of "
        f"this machine. In the form that transformers calls, torch takes {as_called:,.0f} ms. "
        "The other work of a step is not in these times."
    )
    print(f"{title}\n{textwrap.fill(about, 79)}\n")
    most = max(ms for _, ms in compared)
    for name, ms in compared:
        print(f"  {name:<28}{ms:>9,.1f} ms  {'#' * max(1, round(30 * ms / most))}")
    gain = seconds[long_context.BEST_FORM] / seconds[long_context.SPARSE]
    print(f"  {gain:.1f} times as fast as torch's best form\n\n")
    return {"title": title, "about": about, "rows": compared}


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
    times: dict[str, Any],
) -> None:
    """Answer one picture both ways, token by token, and write the page."""
    picture, question = drawn
    inputs = tiny.inputs_of([drawn])
    n = picture.side**2
    print(f"a picture of {picture.side} x {picture.side} glyphs, {n} visual tokens")
    print(textwrap.fill(f"question: {_in_words(question)}", 79) + "\n")
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
    step = {name: 1e3 * float(np.median(taken)) for name, taken in seconds.items()}
    print(
        f"a step of this tiny model: dense {step['dense']:.2f} ms, VisionPulse "
        f"{step['sparse']:.2f} ms, ratio {step['dense'] / step['sparse']:.2f}\n"
        f"  ({n} visual tokens, 1.6 M parameters: nearly all Python, no attention to save)"
    )
    right = {name: list(tokens) == question.answer for name, tokens in
             (("dense", dense), ("VisionPulse", sparse))}  # fmt: skip
    story = {
        "question": _in_words(question),
        "legend": LEGEND,
        "answers": {"dense": trail.words(dense), "VisionPulse": trail.words(sparse)},
        "verdict": ", ".join(f"{name}: {'right' if ok else 'wrong'}" for name, ok in right.items())
        + f"; visual tokens kept: {100 * kept.mean():.2f} % on average",
        "times": times,
    }
    session.trace.to_html(
        out, title="VisionPulse demo", note=f"preset {preset}", story=story,
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
