"""The picture that the README begins with, from the committed rows: `python benchmarks/front.py`.

It carries the numbers that it was drawn from, so that a test can compare them with the rows.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from shapes import CONTEXTS

from visionpulse import schedule
from visionpulse.bench.rows import Row, read
from visionpulse.config import PRESETS
from visionpulse.figures import figure, save_figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "front.png"
LAYERS = 36  # of the published models
DEVICE, ISA = "AMD EPYC, 2 cores", "avx512_bf16"
FORMS = {
    "dense": "sweep cpu:dense", "anchor": "sweep cpu:anchor", "follower": "sweep cpu:follower-5%",
}  # fmt: skip
# label of a bar: the row of the table of accuracy
ANSWERS = {
    "every token": "full attention",
    "VisionPulse 5pct": "dynamic 5pct",
    "the same mean, fixed": "fixed 9 tokens",
    "LOOK-M 50 %": "LOOK-M 50 %",
    "FastV 50 %": "FastV 50 %",
    "VisionZip 50 %": "VisionZip 50 %",
}
BLUE, SOFT, GREY = "#0b5394", "#8ea6c8", "#9aa3ad"
GREY_INK = "#5b6470"


def numbers(results: Path = RESULTS) -> dict[str, Any]:
    """What the picture shows, as plain data."""
    found = {
        f"{row.bench} {row.backend} {row.shape}": row
        for row in read(results / "cpu.jsonl")
        if row.dtype == "bf16" and (row.machine["device"], row.machine["isa"]) == (DEVICE, ISA)
    }
    roles = Counter(
        role.name.lower() for role in schedule.roles(PRESETS["5pct"], (True,) * LAYERS, 0)
    )

    def speed(shape: str, counts: dict[str, int]) -> float:
        base = found[f"sweep torch-sdpa-grouped {shape}"].us_best
        taken = sum(n * found[f"{FORMS[role]} {shape}"].us_best for role, n in counts.items())
        return round(LAYERS * base / taken, 2)

    shapes = {name: f"b1-{name}" for name in CONTEXTS}
    answers = [json.loads(line) for line in (results / "accuracy.jsonl").read_text().splitlines()]
    by_name = {row["name"]: row for row in answers if row.get("set") == "crowded"}
    return {
        "machine": machine(found["sweep cpu:dense b1-32k"]),
        "layers": dict(roles),
        "dense": {name: speed(shape, {"dense": LAYERS}) for name, shape in shapes.items()},
        "sparse": {name: speed(shape, dict(roles)) for name, shape in shapes.items()},
        "answers": {
            label: (round(100 * by_name[name]["exact"], 1), kept(by_name[name]))
            for label, name in ANSWERS.items()
        },
    }


def machine(row: Row) -> str:
    """One line about where a row was measured."""
    about = row.machine
    return f"{about['device'].split(',')[0]}, {about['isa']}, {about['threads']} thread"


def kept(row: dict[str, Any]) -> str:
    share = row["retention"]
    return "all" if share is None else f"{100 * share:.3g} %"


def draw(shown: dict[str, Any], path: Path) -> Path:
    """Speed against context length, beside answers kept."""
    drawing = figure(figsize=(10.5, 4.0))
    speed, answers = drawing.subplots(1, 2, width_ratios=(1.1, 1))
    places = range(len(shown["sparse"]))
    for name, colour, label in (
        ("sparse", BLUE, "VisionPulse, 5 % of visual tokens kept"),
        ("dense", SOFT, "our kernels, every token kept"),
    ):
        line = list(shown[name].values())
        speed.plot(places, line, color=colour, marker="o", linewidth=2.2)
        speed.annotate(label, (len(line) - 1, line[-1]), (0, 9), textcoords="offset points",
                       ha="right", color=colour, fontsize=9.5)  # fmt: skip
    speed.axhline(1, color=GREY, linestyle="--", linewidth=1.3)
    speed.annotate(
        "PyTorch's attention in its best form", (len(places) - 1, 1), (0, 5),
        textcoords="offset points", ha="right", color=GREY_INK, fontsize=9.5,
    )  # fmt: skip
    speed.set_xticks(places, list(shown["sparse"]))
    speed.set_ylim(0, 1.25 * max(shown["sparse"].values()))
    speed.set_xlabel("visual tokens in the context")
    speed.set_title("attention of a decode step: times as fast", loc="left", fontsize=11)
    names = list(shown["answers"])[::-1]
    shares = [shown["answers"][name][0] for name in names]
    colours = [BLUE if name.startswith("VisionPulse") else SOFT for name in names]
    answers.barh(names, shares, color=colours, height=0.62)
    for at, name in enumerate(names):
        share, of = shown["answers"][name]
        answers.annotate(f"{share:g} % · kept {of}", (share, at), (5, 0),
                         textcoords="offset points", va="center", fontsize=9.5)  # fmt: skip
    answers.set_xlim(0, 160)
    answers.set_xticks((0, 50, 100))
    answers.set_title("answers right, our test task", loc="left", fontsize=11)
    for axes in (speed, answers):
        axes.spines[["top", "right"]].set_visible(False)
    layers = ", ".join(
        f"{n} {role}{'s' * (role == 'follower')}" for role, n in shown["layers"].items()
    )
    drawing.supxlabel(
        f"left: {shown['machine']}, batch 1, bf16, measured layers: {layers}; "
        "right: a tiny model, 500 pictures of 400 visual tokens",
        x=0.01, ha="left", fontsize=8.5, color=GREY_INK,
    )  # fmt: skip
    return save_figure(drawing, path, Description=json.dumps(shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    draw(numbers(), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
