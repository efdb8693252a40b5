"""Mass against activated tokens, by layer and threshold: `python benchmarks/accuracy/correlate.py`.

Also how similar the layers are, what is never active, and what the mass is in each kind of step.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from table import SEED, about

from visionpulse.bench.progress import progress_bar
from visionpulse.calibration.correlation import (
    correlations,
    pearson,
    plot_correlation,
    plot_similarity,
    similarity,
)
from visionpulse.calibration.observe import THRESHOLDS, Observation, observe
from visionpulse.data import tiny, trail
from visionpulse.files import write_text

# those of the paper, and larger ones: 400 tokens share what thousands share there
LIMITS = (*THRESHOLDS, 0.005, 0.01, 0.02)
BATCH = 25


def by_kind(seen: Observation, drawn: list) -> list[dict]:
    """What steps that write marks, pointers, sums and words look like, and r with the true need."""
    kinds, needs = [], []
    for prompt, step in zip(seen.prompt, seen.step, strict=True):
        question = drawn[prompt][1]
        at = int(step) + 1  # a decode step writes the token after the one it reads
        on_path = seen.answers[prompt][: at + 1] == tuple(question.answer[: at + 1])
        kinds.append(question.kinds[at] if on_path else "")
        needs.append(len(question.needs[at]) if kinds[-1] == "marks" else
                     min(1, len(question.needs[at])) if on_path else 0)  # fmt: skip
    kinds, needs = np.array(kinds), np.array(needs)
    rows = []
    for i, layer in enumerate(seen.layers):
        row = {"bench": "accuracy-mass", "layer": layer, "steps": int((kinds != "").sum())}
        for kind in ("marks", "next", "sum", "word"):
            row[f"mass {kind}"] = float(seen.mass_mean[kinds == kind, i].mean())
        row["r need"] = pearson(seen.mass_mean[kinds != "", i], needs[kinds != ""])
        # among steps that all look at the picture: does the mass know how many tokens they need?
        marks = kinds == "marks"
        row["r need, marks"] = pearson(seen.mass_mean[marks, i], needs[marks])
        rows.append(row)
    return rows


def printed(rows: list[dict]) -> str:
    """The rows as tables of Markdown."""
    lines = ["| layer | mass in steps of marks | next | sum | words | r with the tokens needed | "
             "the same, steps of marks alone |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in (row for row in rows if row["bench"] == "accuracy-mass"):
        cells = [f"{row[f'mass {kind}']:.3f}" for kind in ("marks", "next", "sum", "word")]
        lines.append(f"| {row['layer']} | " + " | ".join(cells)
                     + f" | {row['r need']:.2f} | {row['r need, marks']:.2f} |")  # fmt: skip
    found = [row for row in rows if row["bench"] == "accuracy-correlation"]
    limits = list(dict.fromkeys(row["threshold"] for row in found))
    lines += ["", "Pearson's r of mass and activated tokens over all steps, in brackets the median "
              "of r among first steps, second steps, ... (nan: nothing varied), and the share of "
              "tokens never active, by threshold:", ""]  # fmt: skip
    lines.append("| layer | " + " | ".join(f"{limit:g}" for limit in limits) + " |")
    lines.append("|---" * (len(limits) + 1) + "|")
    for layer in dict.fromkeys(row["layer"] for row in found):
        cells = [
            f"{row['pooled']:.2f} ({row['per_step']:.2f}); {100 * row['never']:.0f} %"
            for row in found
            if row["layer"] == layer
        ]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    (matrix,) = (row["cosine"] for row in rows if row["bench"] == "accuracy-similarity")
    lines += ["", "Mean cosine of the visual attention of two layers:", ""]
    lines.append("| | " + " | ".join(map(str, range(len(matrix)))) + " |")
    lines.append("|---" * (len(matrix) + 1) + "|")
    for layer, line in enumerate(matrix):
        lines.append(f"| {layer} | " + " | ".join(f"{value:.2f}" for value in line) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=tiny.FOLDER)
    parser.add_argument("--n", type=int, default=200, help="pictures")
    parser.add_argument("--layer", type=int, default=2, help="of the scatter plot")
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines")
    parser.add_argument("--plots", type=Path, help="folder for scatter and similarity plots")
    args = parser.parse_args()
    torch.set_num_threads(1)
    drawn = trail.test_set(SEED, args.n, tiny.SIDE, "crowded")
    inputs = [tiny.inputs_of(drawn[i : i + BATCH]) for i in range(0, args.n, BATCH)]
    tick = progress_bar()
    seen = observe(
        tiny.load(args.weights), inputs, thresholds=LIMITS,
        tick=lambda done: tick("batches", done, len(inputs)),
    )  # fmt: skip
    cosine = np.round(similarity(seen), 4).tolist()
    rows = [{"bench": "accuracy-correlation", **row._asdict()} for row in correlations(seen)]
    rows += [*by_kind(seen, drawn), {"bench": "accuracy-similarity", "cosine": cosine}]
    print(printed(rows))
    if args.out:
        known = about(args.weights) | {"n": args.n}
        write_text(args.out, "".join(json.dumps(row | known) + "\n" for row in rows))
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        print(plot_correlation(seen, args.layer, args.plots / "correlation.png"))
        print(plot_similarity(seen, args.plots / "similarity.png"))


if __name__ == "__main__":
    main()
