"""What a cache of 8 bits costs in answers: `python benchmarks/accuracy/float8.py`.

The tiny model answers the same pictures with a cache of its own dtype and one of 8 bits; a step's
selection is compared with that of the other cache as long as both runs said the same. Rounding a
key moves its logit by a share of it, so the same is measured with larger logits too: q and K scaled
up until full attention itself loses answers.
"""

import argparse
import json
import math
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from claims import exact
from measure import Answers, answer, summary
from rows import P5, P10
from table import SEED, about, read

import visionpulse as vp
from visionpulse.bench import cost
from visionpulse.bench.layers import Shape
from visionpulse.bench.memory import gib, memory, schedules
from visionpulse.bench.progress import progress_bar
from visionpulse.data import tiny, trail
from visionpulse.files import write_text

SETTINGS = {
    "full attention": vp.PRESETS["dense"],
    "5pct": P5,
    "10pct": P10,
    "5pct, lookback": P5.updated(schedule="lookback"),
}
CACHES = ("model", "fp8")
FACTORS = (1, 4, 16)  # of the logits
BATCH = 25
TIMES = ("step_ms_p50", "spent_s")  # of no meaning here: no machine is timed


@contextmanager
def larger_logits(model: torch.nn.Module, factor: float) -> Iterator[None]:
    """Scale q and K alike, so that every logit is `factor` times as large."""
    root = math.sqrt(factor)
    norms = [
        m for name, m in model.get_decoder().named_modules() if name.endswith(("q_norm", "k_norm"))
    ]
    assert norms, "the model has no norm of q and K whose weight could carry the factor"
    for norm in norms:
        norm.weight.data.mul_(root)
    try:
        yield
    finally:
        for norm in norms:
            norm.weight.data.div_(root)


def kept_by_step(trace: vp.Trace) -> dict[tuple[int, int, int], frozenset[int]]:
    """The kept tokens of each row, step and layer."""
    return {(row.row, row.step, row.layer): frozenset(row.kept.tolist()) for row in trace}


def overlaps(traces: Sequence[vp.Trace], answers: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    """The share of a step's tokens that the other run keeps too, while both say the same."""
    (kept, other), (said, others) = map(kept_by_step, traces), answers
    found = []
    for (row, step, layer), tokens in kept.items():
        so_far = said[row][: step + 1]  # a step takes the token that the one before it made
        both = (row, step, layer) in other  # a batch whose longest row ended here goes no further
        if both and len(so_far) > step and so_far == others[row][: step + 1] and tokens:
            found.append(len(tokens & other[row, step, layer]) / len(tokens))
    return found


class Made:
    """The answers of one size of logits so far."""

    def __init__(self) -> None:
        self.answers = {(name, cache): Answers([], [], []) for name in SETTINGS for cache in CACHES}
        self.shared: dict[str, list[float]] = {name: [] for name in SETTINGS}
        self.n = 0

    def add(self, model, drawn: list) -> None:
        """Let the model answer some more pictures."""
        settings = {
            (name, cache): SETTINGS[name].updated(cache=cache) for name, cache in self.answers
        }
        traces: dict = {}
        made = answer(model, drawn, settings, traces=traces)
        for key, answers in made.items():
            self.answers[key].add(answers)
        for name in SETTINGS:
            keys = [(name, cache) for cache in CACHES]
            self.shared[name] += overlaps(
                [traces[key] for key in keys], [made[key].tokens for key in keys]
            )
        self.n += len(drawn)

    def rows(self, factor: float, questions: list) -> Iterator[dict]:
        """What was measured."""
        for (name, cache), answers in self.answers.items():
            found = {k: v for k, v in summary(questions, answers).items() if k not in TIMES}
            what = {"bench": "accuracy-float8", "set": "crowded", "name": name, "cache": cache}
            if cache == "fp8" and self.shared[name]:
                share = np.array(self.shared[name])
                found |= {"steps": len(share), "overlap": round(float(share.mean()), 4),
                          "same": round(float((share == 1).mean()), 4)}  # fmt: skip
            yield what | {"logits": factor} | found


def printed(rows: list[dict]) -> str:
    """The rows as a table of Markdown, and what they say of 5pct."""
    known = {(row["logits"], row["name"], row["cache"]): row for row in rows}
    lines = [
        "| logits | setting | right (95 %) | right with 8 bits | lost, won | kept "
        "| kept with 8 bits | same tokens | same list |",
        "|---" * 9 + "|",
    ]
    for (factor, name, cache), row in known.items():
        if cache == "fp8":
            continue
        other = known[factor, name, "fp8"]
        pairs = list(zip(row["right"], other["right"], strict=True))
        shares = ["all" if row["name"] == "full attention" else f"{100 * r['retention']:.2f} %"
                  for r in (row, other)]  # fmt: skip
        same = [f"{100 * other[k]:.1f} %" if k in other else "" for k in ("overlap", "same")]
        lines.append(
            f"| x {factor:g} | {name} | {exact(row)} | {exact(other)} | "
            f"-{pairs.count(('1', '0'))} +{pairs.count(('0', '1'))} | {shares[0]} | {shares[1]} | "
            f"{same[0]} | {same[1]} |"
        )
    plain, small = (known[1, "5pct", cache] for cache in CACHES)
    least = min(row["n"] for row in rows)
    points = 100 * (plain["exact"] - small["exact"])
    lines += [
        "",
        f"{plain['n']} crowded pictures a row at the model's own logits, {least} or more at larger "
        "ones. Dynamic 5pct with a cache of 8 bits "
        + (f"loses {points:.1f} points" if points > 0 else "loses no point")
        + f" against 5pct: {exact(small)} and {exact(plain)}.",
    ]
    return "\n".join(lines)


def request() -> str:
    """What a request of the published shape takes, as a table of Markdown."""
    decoder, config = cost.decoder_of("qwen3-vl-4b"), vp.PRESETS["5pct"]
    names = " | ".join(f"moved in a step: {name}" for name in schedules(config))
    lines = [f"| visual tokens | stored | the cache | {names} |", "|---" * 6 + "|"]
    for visual in (8192, 32768):
        for cache, stored in (("model", "16 bits"), ("fp8", "8 bits")):
            shape = Shape("", 1, visual, cache=cache)
            held, moved = memory(
                shape.cost(torch.bfloat16), decoder.is_full, config.updated(cache=cache)
            )
            cells = " | ".join(map(gib, (held, *moved.values())))
            lines.append(f"| {visual} | {stored} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=tiny.FOLDER)
    parser.add_argument("--n", type=int, default=500, help="pictures of a row")
    parser.add_argument("--logits", type=float, nargs="+", default=FACTORS, help="their factors")
    parser.add_argument("--out", type=Path, help="JSON lines; rows of other factors in it stay")
    parser.add_argument("--resume", type=Path, help="file to go on from, written after each batch")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="then stop, with what there is"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tick, begun = tiny.load(args.weights), progress_bar(), time.monotonic()
    drawn = trail.test_set(SEED, args.n, tiny.SIDE, "crowded")
    all_made: dict[float, Made] = {}
    if args.resume and args.resume.exists():
        all_made = pickle.loads(args.resume.read_bytes())
    for factor in args.logits:
        made = all_made.setdefault(factor, Made())
        with larger_logits(model, factor):
            while made.n < args.n:
                if made.n and time.monotonic() - begun > 60 * args.minutes:
                    break
                made.add(model, drawn[made.n : made.n + BATCH])
                tick(f"logits x {factor:g}", made.n, args.n)
                if args.resume:
                    args.resume.write_bytes(pickle.dumps(all_made))
        rows = read(args.out) if args.out and args.out.exists() else []
        questions = [question for _, question in drawn[: made.n]]
        new = [about(args.weights) | row for row in made.rows(factor, questions)]
        rows = [row for row in rows if row["logits"] != factor] + new
        rows.sort(key=lambda row: row["logits"])
        if args.out:
            write_text(args.out, "".join(json.dumps(row) + "\n" for row in rows))
    if any(row["logits"] == 1 for row in rows):
        print(printed(rows))


if __name__ == "__main__":
    main()
