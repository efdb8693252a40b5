"""Which tokens a draft gets right: `python benchmarks/accuracy/acceptance.py --seconds 400`.

Each draft runs along the dense answers of the tiny model, one token at a time; rounds of any length
are counted from that, by kind of token. Appends the rows of each draft that has none yet for these
weights; run it again for the rest.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from lossless import BLIND, LOOKBACK, P5, P10, SETS
from measure import MOST_TOKENS
from table import SEED, about, read

import visionpulse as vp
from visionpulse.bench.rows import Machine
from visionpulse.calibration.acceptance import DRAFTS, accepted_by_kind, accepted_of
from visionpulse.calibration.trials import along
from visionpulse.data import tiny, trail
from visionpulse.files import append_line

OUT = Path(__file__).parents[1] / "results" / "accuracy-acceptance.jsonl"
KINDS = ("all", "marks", "next", "sum", "word")
WAYS = {
    "5pct, lookback": LOOKBACK,
    "10pct, lookback": P10.updated(schedule="lookback", refresh=0),
    "fixed 2 %, lookback": LOOKBACK.updated(budget=vp.Fixed(0.02)),
    "fixed 1 %, lookback": LOOKBACK.updated(budget=vp.Fixed(0.01)),
    "5pct": P5,
    "10pct": P10,
    "one token a layer": BLIND,
}
COUNTS = {"crowded": (200, 10), "sparse": (200, 10), "large": (50, 5)}  # pictures, and of a batch


class Answers(NamedTuple):
    """One batch of pictures, with what the unpatched model says of them."""

    inputs: dict
    tokens: list[tuple[int, ...]]
    kinds: list[list[str]]


def batches(which: str) -> Iterator[list]:
    """The pictures of the accuracy table, batch by batch."""
    (crowd, side), (n, batch) = SETS[which], COUNTS[which]
    return (trail.test_set(SEED + part, batch, side, crowd) for part in range(n // batch))


def answers(model, drawn: list) -> Answers:
    """Greedy answers of a batch, up to their ends."""
    inputs = tiny.inputs_of(drawn)
    out = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
    tokens = [tiny.until_end(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
    kinds = [q.kinds_of(said)[1:] for (_, q), said in zip(drawn, tokens, strict=True)]
    return Answers(inputs, [tuple(said) for said in tokens], kinds)


def says_of(model, config: vp.PulseConfig, made: list[Answers]) -> tuple[list[list[bool]], float]:
    """Where the draft says the dense model's token, and the share of visual tokens it kept."""
    says = []
    with vp.patch(model, config) as session:
        for inputs, tokens, _ in made:
            for said, right in zip(along(model, inputs, tokens, {}).argmax(-1).tolist(), tokens,
                                   strict=True):  # fmt: skip
                says.append([a == b for a, b in zip(said, right[1:], strict=False)])
        return says, session.stats.retention.mean


def rows_of(says: list[list[bool]], kinds: list[list[str]]) -> Iterator[dict]:
    """One row per length of a round and kind of token, and one for all tokens."""
    for drafted in DRAFTS:
        checks, tried, accepted = accepted_of(says, drafted)
        counts = {"all": (tried, accepted)} | accepted_by_kind(says, kinds, drafted)
        for kind, (tried, accepted) in counts.items():
            yield {
                "tokens": drafted, "kind": kind, "checks": checks, "drafted": tried,
                "accepted": accepted,
            }  # fmt: skip


def printed(rows: list[dict]) -> str:
    """The rows as a table of Markdown."""
    lines = ["| draft | pictures | token | " + " | ".join(f"g = {n}" for n in DRAFTS) + " |",
             "|---|---|---|" + "---:|" * len(DRAFTS)]  # fmt: skip
    cells = {(r["set"], r["draft"], r["kind"], r["tokens"]): r for r in rows}
    for which, name in dict.fromkeys((row["set"], row["draft"]) for row in rows):
        for kind in KINDS:
            found = [cells.get((which, name, kind, n)) for n in DRAFTS]
            shares = (f"{100 * r['accepted'] / r['drafted']:.1f} %" if r else "" for r in found)
            lines.append(f"| {name} | {which} | {kind} | " + " | ".join(shares) + " |")
    where = " and ".join(sorted({f"{row['cpu']}, commit {row['commit']}" for row in rows}))
    sizes = ", ".join(f"{n} {which}" for which, n in {r["set"]: r["n"] for r in rows}.items())
    return "\n".join(lines) + f"\n\n{sizes} pictures. {where}: `benchmarks/accuracy/acceptance.py`"


def brief(rows: list[dict]) -> str:
    """Rounds of four drafted tokens alone, the kinds beside each other."""
    lines = ["| draft | pictures | " + " | ".join(KINDS) + " |",
             "|---|---|" + "---:|" * len(KINDS)]  # fmt: skip
    shares = {(r["set"], r["draft"], r["kind"]): r["accepted"] / r["drafted"]
              for r in rows if r["tokens"] == 4}  # fmt: skip
    for which, name in dict.fromkeys((row["set"], row["draft"]) for row in rows):
        cells = (f"{100 * shares[which, name, kind]:.1f} %" for kind in KINDS)
        lines.append(f"| {name} | {which} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=400, help="start no draft after these")
    parser.add_argument("--weights", type=Path, default=tiny.FOLDER)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    old = read(args.out) if args.out.exists() else []
    known, begun = about(args.weights), time.monotonic()
    done = {(row["set"], row["draft"]) for row in old if row["weights"] == known["weights"]}
    model = tiny.load(args.weights)
    for which, (n, _) in COUNTS.items():
        missing = [name for name in WAYS if (which, name) not in done]
        if not missing or time.monotonic() - begun > args.seconds:
            continue
        made = [answers(model, drawn) for drawn in batches(which)]
        kinds = [each for batch in made for each in batch.kinds]
        for name in missing:
            if time.monotonic() - begun > args.seconds:
                break
            says, retention = says_of(model, WAYS[name], made)
            for row in rows_of(says, kinds):
                where = {"bench": "acceptance", "set": which, "draft": name, "n": n,
                         "retention": retention}  # fmt: skip
                row = where | row | known | {"cpu": Machine.here().device}
                append_line(args.out, json.dumps(row))
            print(f"{which}, {name}: {len(says)} answers", flush=True)


if __name__ == "__main__":
    main()
