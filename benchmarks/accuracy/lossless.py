"""Compare lossless decoding with full attention, picture by picture, on the tiny model.

    python benchmarks/accuracy/lossless.py --seconds 400

Appends a row for each condition that has none yet for these weights; run it again for the rest.
Every row says how many pictures got the unpatched model's tokens, and how many drafts were taken.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from measure import MOST_TOKENS
from table import LARGE_SIDE, SEED, about, read

import visionpulse as vp
from visionpulse.bench.rows import Machine
from visionpulse.data import tiny, trail
from visionpulse.data.tiny import inputs_of, until_end
from visionpulse.files import append_line

P5, P10 = vp.PRESETS["5pct"], vp.PRESETS["10pct"]
LOOKBACK = P5.updated(schedule="lookback", refresh=0)
BLIND = P5.updated(budget=vp.TopK(1), schedule="per_layer")  # an absurd draft
OUT = Path(__file__).parents[1] / "results" / "accuracy-lossless.jsonl"


class Condition(NamedTuple):
    """What drafts, how many tokens, on which pictures, and how tokens are chosen."""

    draft: str
    config: vp.PulseConfig
    tokens: int
    which: str = "crowded"
    temperature: float = 0.0  # 0 is greedy
    n: int = 100
    batch: int = 10  # 1 is generate() itself


CONDITIONS = (
    Condition("5pct, lookback", LOOKBACK, 4, n=500),
    Condition("5pct, lookback", LOOKBACK, 4, temperature=1.0),
    Condition("one token a layer", BLIND, 4),
    Condition("5pct, lookback", LOOKBACK, 15),
    Condition("5pct, lookback", LOOKBACK, 4, "sparse"),
    Condition("5pct, lookback", LOOKBACK, 4, "large", n=50, batch=5),
    Condition("10pct", P10, 4),
    Condition("10pct", P10, 4, temperature=1.0),
    Condition("5pct, lookback", LOOKBACK, 4, batch=1),
    *(Condition("5pct, lookback", LOOKBACK, g) for g in (2, 8)),
    *(Condition("10pct", P10, g) for g in (2, 8, 15)),
    Condition("5pct, lookback", LOOKBACK, 4, temperature=2.0, batch=1),
    Condition("random budget", P5.updated(budget=vp.Random(seed=1), ratio=(0.0, 0.01)), 4),
    Condition("one token a layer", BLIND, 4, temperature=1.0),
    Condition("10pct", P10, 4, n=500),
)  # fmt: skip
SETS = {"crowded": ("crowded", tiny.SIDE), "sparse": ("sparse", tiny.SIDE),
        "large": ("crowded", LARGE_SIDE)}  # fmt: skip


def batches(one: Condition) -> Iterator[tuple[int, dict]]:
    """The pictures of the accuracy table, batch by batch, each with a seed for its dice."""
    crowd, side = SETS[one.which]
    for part in range(one.n // one.batch):
        yield part, inputs_of(trail.test_set(SEED + part, one.batch, side, crowd))


def answers(generate, one: Condition, part: int, inputs: dict) -> list[list[int]]:
    """The answers of a batch, up to their ends."""
    torch.manual_seed(part)
    options = {"max_new_tokens": MOST_TOKENS, "do_sample": one.temperature > 0}
    if one.temperature:
        options |= {"temperature": one.temperature, "top_k": 0}
    out = generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    return [until_end(row) for row in out.tolist()]


def measure(model, one: Condition) -> dict:
    """One row: how many of the answers are those of the unpatched model."""
    equal = 0
    dense = []
    for part, inputs in batches(one):
        dense.append(answers(model.generate, one, part, inputs))
    with vp.patch(model, one.config, lossless=True, draft=one.tokens) as session:
        for part, inputs in batches(one):
            got = answers(session.generate, one, part, inputs)
            equal += sum(a == b for a, b in zip(got, dense[part], strict=True))
        stats = session.stats
    return {
        "n": one.n, "equal": equal, "checks": stats.checks, "drafted": stats.drafted,
        "accepted": stats.accepted, "acceptance": stats.accepted / stats.drafted,
        "tokens_per_check": stats.tokens_per_check,
    }  # fmt: skip


def key_of(row: dict) -> tuple:
    """What makes a row this one."""
    return tuple(row[name] for name in ("draft", "tokens", "set", "temperature", "batch", "n"))


def printed(rows: list[dict]) -> str:
    """The rows as a table of Markdown."""
    lines = ["| draft | pictures | rows | tokens a round | chosen | equal | accepted "
             "| tokens a check |", "|---|---|---:|---:|---|---:|---:|---:|"]  # fmt: skip
    for row in rows:
        chosen = f"sampled at {row['temperature']:g}" if row["temperature"] else "greedy"
        lines.append(
            f"| {row['draft']} | {row['set']} | {row['batch']} | {row['tokens']} | {chosen} "
            f"| {row['equal']} of {row['n']} | {100 * row['acceptance']:.1f} % "
            f"| {row['tokens_per_check']:.2f} |"
        )
    where = " and ".join(sorted({f"{row['cpu']}, commit {row['commit']}" for row in rows}))
    return "\n".join(lines) + f"\n\n{where}: `python benchmarks/accuracy/lossless.py`\n"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=400, help="start no condition after these")
    parser.add_argument("--weights", type=Path, default=tiny.FOLDER)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    known = about(args.weights)
    old = read(args.out) if args.out.exists() else []
    done = {key_of(row) for row in old if row["weights"] == known["weights"]}
    model, begun = tiny.load(args.weights), time.monotonic()
    for one in CONDITIONS:
        where = {"draft": one.draft, "tokens": one.tokens, "set": one.which,
                 "temperature": one.temperature, "batch": one.batch}  # fmt: skip
        if key_of(where | {"n": one.n}) in done or time.monotonic() - begun > args.seconds:
            continue
        row = {"bench": "lossless", **where, **measure(model, one), **known,
               "cpu": Machine.here().device}  # fmt: skip
        append_line(args.out, json.dumps(row))
        taken = f"accepted {row['acceptance']:.3f}, {row['tokens_per_check']:.2f} tokens a check"
        print(f"{key_of(row)}: {row['equal']} of {row['n']} equal, {taken}", flush=True)


if __name__ == "__main__":
    main()
