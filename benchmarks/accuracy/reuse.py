"""How often a step keeps what earlier steps kept: `python benchmarks/accuracy/reuse.py`.

By kind of step, on the tiny model: the overlap with the step before, and the hits of an LRU cache
of 1, 2 and 4 times K_max.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measure import MOST_TOKENS
from rows import P5, P10
from table import LARGE_SIDE, SEED, about

import visionpulse as vp
from visionpulse.bench.progress import progress_bar
from visionpulse.budgets import bound_count
from visionpulse.data import tiny, trail
from visionpulse.figures import figure, save_figure
from visionpulse.files import write_text
from visionpulse.trace.reuse import Reuse, reuse

TIMES = (1, 2, 4)  # of K_max
KINDS = ("marks", "next", "sum", "word")
# What a tier outside the device would be asked at the shapes of a model of 4 billion parameters: 18
# followers, 8 KV heads, head dim 128, 16 bit, K and V; one list serves all followers, so a token is
# one record.
RECORD = 18 * 2 * 8 * 128 * 2  # bytes
FAR_TOKENS = 32768
# Line rates, bytes a second in one direction: PCI Express 5.0 (32 GT/s a lane, 128b/130b) with 16
# lanes, and with the 4 of an SSD; Nvidia's figure for NVLink-C2C.
LINKS = {"NVLink-C2C": 450e9, "PCIe 5.0 x16": 63e9, "NVMe, PCIe 5.0 x4": 15.75e9}
SETTINGS = {"5pct": P5, "10pct": P10}
SIDES = {"crowded": tiny.SIDE, "large": LARGE_SIDE}
BATCH = 10


class Walked(NamedTuple):
    """The reuse of one batch, and what each entry's step wrote."""

    reuse: Reuse
    kinds: np.ndarray  # "" behind the end of an answer, or once it has left the right one


def walk(model, drawn: list, config: vp.PulseConfig) -> Walked:
    """Answer a batch and count what each step found."""
    given = tiny.inputs_of(drawn)
    with vp.patch(model, config, record=True) as session:
        out = model.generate(**given, do_sample=False, max_new_tokens=MOST_TOKENS)
        trace = session.trace
    answers = [tiny.until_end(row) for row in out[:, given["input_ids"].shape[1] :].tolist()]
    written = [
        question.kinds_of(answer) for (_, question), answer in zip(drawn, answers, strict=True)
    ]
    kinds = []
    for entry in trace:
        at = entry.step + 1  # a step writes the token after its own
        kinds.append(written[entry.row][at] if at < len(written[entry.row]) else "")
    most = partial(bound_count, config.ratio[1])
    sizes = [lambda n, times=times: times * most(n) for times in TIMES]
    return Walked(reuse(trace, sizes), np.array(kinds))


def rows_of(name: str, which: str, walked: list[Walked]) -> Iterator[dict]:
    """One row per kind of step, and one for all of them."""
    kinds = np.concatenate([part.kinds for part in walked])
    seen = Reuse(
        *(np.concatenate(column) for column in zip(*(p.reuse for p in walked), strict=True))
    )
    for kind in ("all", *KINDS):
        where = kinds != "" if kind == "all" else kinds == kind
        yield {
            "bench": "accuracy-reuse", "set": which, "setting": name, "kind": kind,
            "steps": int((where & seen.follows).sum()),
            "kept": float(seen.wanted[where & seen.follows].mean()),
            "overlap": round(seen.overlap(where), 4),
            "hits": [round(rate, 4) for rate in seen.hit_rates(where)],
        }  # fmt: skip


def printed(rows: list[dict]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| pictures | setting | step writes | steps | tokens kept | kept by the step before | "
        + " | ".join(f"hit in {times} x K_max" for times in TIMES) + " |",
        "|---" * (6 + len(TIMES)) + "|",
    ]  # fmt: skip
    for row in rows:
        rates = " | ".join(f"{100 * rate:.0f} %" for rate in (row["overlap"], *row["hits"]))
        lines.append(
            f"| {row['set']} | {row['setting']} | {row['kind']} | {row['steps']} | "
            f"{row['kept']:.1f} | {rates} |"
        )
    return "\n".join(lines)


def tier(rows: list[dict]) -> str:
    """What a step would fetch at FAR_TOKENS, if it reuses what steps on large pictures reuse."""
    lines = [
        f"| setting | step writes | kept of {FAR_TOKENS} | LRU | device holds | fetched | "
        + " | ".join(f"over {link}" for link in LINKS) + " |",
        "|---" * (6 + len(LINKS)) + "|",
    ]  # fmt: skip
    for row in (row for row in rows if row["set"] == "large" and row["kind"] in ("all", "marks")):
        kept = row["kept"] / LARGE_SIDE**2 * FAR_TOKENS
        for times, hits in zip(TIMES, row["hits"], strict=True):
            held = times * bound_count(SETTINGS[row["setting"]].ratio[1], FAR_TOKENS)
            moved = kept * (1 - hits) * RECORD
            took = " | ".join(f"{1e3 * moved / rate:.2f} ms" for rate in LINKS.values())
            lines.append(
                f"| {row['setting']} | {row['kind']} | {kept:.0f} | {times} x K_max | "
                f"{held * RECORD / 2**20:.0f} MiB | {moved / 2**20:.1f} MiB | {took} |"
            )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> Path:
    """Hit rates by kind of step, one panel per setting, of the crowded pictures."""
    drawing = figure(figsize=(8.4, 3.4))
    axes = drawing.subplots(1, len(SETTINGS), sharey=True)
    labels = ["step before", *(f"LRU {times} x K_max" for times in TIMES)]
    shades = ("#c9d3e3", "#8ea6c8", "#54759f", "#27456f")
    for axis, name in zip(axes, SETTINGS, strict=True):
        found = {r["kind"]: r for r in rows if r["setting"] == name and r["set"] == "crowded"}
        at = np.arange(len(KINDS) + 1)
        for i, (label, shade) in enumerate(zip(labels, shades, strict=True)):
            rates = [
                (row["overlap"], *row["hits"])[i]
                for row in (found[kind] for kind in ("all", *KINDS))
            ]
            axis.bar(at + 0.2 * (i - 1.5), rates, 0.2, label=label, color=shade)
        axis.set_xticks(at, ("all", *KINDS))
        axis.set_title(name, fontsize=10)
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of the kept tokens found")
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                   frameon=False)  # fmt: skip
    return save_figure(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=tiny.FOLDER)
    parser.add_argument("--n", type=int, default=200, help="pictures of each set")
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tick, rows = tiny.load(args.weights), progress_bar(), []
    for which, side in SIDES.items():
        drawn = trail.test_set(SEED, args.n, side, "crowded")
        for name, config in SETTINGS.items():
            walked = []
            for begin in range(0, args.n, BATCH):
                walked.append(walk(model, drawn[begin : begin + BATCH], config))
                tick(f"{which}, {name}", begin + BATCH, args.n)
            rows += rows_of(name, which, walked)
    print(printed(rows), tier(rows), sep="\n\n")
    if args.out:
        known = about(args.weights) | {"n": args.n}
        write_text(args.out, "".join(json.dumps(row | known) + "\n" for row in rows))
    if args.plot:
        print(plot(rows, args.plot))


if __name__ == "__main__":
    main()
