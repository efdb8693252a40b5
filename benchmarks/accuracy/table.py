"""Print the accuracy table of the tiny model: `python benchmarks/accuracy/table.py`.

Every row runs through vp.patch or a baseline over the model, on the kernels of this machine; rows
of one table answer the same pictures, which no training run has seen.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import rows as table
import torch
from measure import Answers, answer, summary

from visionpulse.bench.progress import progress_bar
from visionpulse.data import tiny, trail
from visionpulse.files import write_text

SEED = 90_000  # training draws from another stream of seeds, see train.Trainer
LARGE_SIDE = 40  # 1600 tokens: four times the largest pictures of training
HEADERS = ("", "n", "exact % (95 %)", "hops %", "tokens", "kept %", "ms/step", "vs full")


def settings_of(which: str) -> dict:
    """What is asked of a test set: row name -> setting."""
    rows = (table.FULL, table.FIRST, *table.ROWS)
    wanted = {"sparse": table.SPARSE, "large": table.LARGE}.get(which)
    return {row.name: row.setting for row in rows if wanted is None or row.name in wanted}


class Job(NamedTuple):
    """One batch of one test set, under some rows."""

    which: str
    crowd: str
    side: int
    seed: int
    pictures: int
    rows: tuple[str, ...]
    weights: Path


class Part(NamedTuple):
    """A job that is done."""

    job: Job
    questions: list[trail.Question]
    answers: dict[str, Answers]


def run(job: Job) -> Part:
    """Answer a batch in a process of its own, on one thread."""
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    drawn = trail.test_set(job.seed, job.pictures, job.side, job.crowd)
    known = settings_of(job.which)
    made = answer(tiny.load(job.weights), drawn, {name: known[name] for name in job.rows})
    return Part(job, [question for _, question in drawn], made)


def about(weights: Path) -> dict:
    """What a row was measured with."""
    import transformers

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    digest = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()[:12]
    return {
        "weights": digest, "commit": commit, "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(), "seed": SEED,
    }  # fmt: skip


def jobs_of(args: argparse.Namespace) -> Iterator[tuple[str, Job]]:
    """All batches, a share of every set at a time, so that a stopped run has rows of one length."""
    wanted = [part for part in args.only.split(",") if part]
    sets = {
        "crowded": ("crowded", tiny.SIDE, args.n, args.batch),
        "sparse": ("sparse", tiny.SIDE, args.n, args.batch),
        "large": ("crowded", LARGE_SIDE, args.large, max(1, args.batch // 5)),
    }
    for part in range(max(-(-n // batch) for _, _, n, batch in sets.values())):
        for which, (crowd, side, n, batch) in sets.items():
            pictures = min(batch, n - part * batch)
            if pictures <= 0:
                continue
            rows = tuple(
                name
                for name in settings_of(which)
                if not wanted or name == table.FULL.name or any(w in name for w in wanted)
            )
            yield which, Job(which, crowd, side, SEED + part, pictures, rows, args.weights)


class Made:
    """The answers so far, by test set and row."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, int], Part] = {}

    def add(self, part: Part) -> None:
        self.parts[part.job.which, part.job.seed] = part

    def rows(self, groups: dict[str, str]) -> list[dict]:
        found = []
        for which in ("crowded", "sparse", "large"):
            parts = [self.parts[key] for key in sorted(self.parts) if key[0] == which]
            if not parts:
                continue
            first = parts[0].job
            questions = [question for part in parts for question in part.questions]
            for name in first.rows:
                whole = Answers([], [], [])
                for part in parts:
                    whole.add(part.answers[name])
                where = {"set": which, "side": first.side, "visual_tokens": first.side**2}
                what = {"bench": "accuracy", "name": name, "group": groups[name]}
                found.append(what | where | summary(questions, whole) | {"batch": first.pictures})
        return found


def printed(found: list[dict]) -> str:
    """The rows as a table of Markdown."""
    found = [row for row in found if row["bench"] == "accuracy"]
    full = {row["set"]: row for row in found if row["name"] == table.FULL.name}
    lines = []
    for which in dict.fromkeys(row["set"] for row in found):
        here = [row for row in found if row["set"] == which]
        tokens = here[0]["visual_tokens"]
        lines += ["", f"**{which}**, {tokens} visual tokens, answers of "
                  f"{here[0]['length_wanted']:.1f} tokens", ""]  # fmt: skip
        lines += ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
        for row in here:
            # rows begin with the same pictures, however many they have
            pairs = list(zip(full[which]["right"], row["right"], strict=False))
            lost, won = pairs.count(("1", "0")), pairs.count(("0", "1"))
            kept = "" if row["retention"] is None else f"{100 * row['retention']:.2f}"
            exact = f"{100 * row['exact']:.1f} ({100 * row['exact_low']:.1f}.."
            cells = (
                row["name"], str(row["n"]), exact + f"{100 * row['exact_high']:.1f})",
                f"{100 * row['hops']:.1f}", f"{row['length']:.1f}", kept,
                f"{row['step_ms_p50']:.1f}", "" if row is full[which] else f"-{lost} +{won}",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """The old rows with those that were measured anew in their places."""

    def key(row: dict) -> tuple:
        return row["bench"], row.get("set"), row.get("name")

    fresh = {key(row): row for row in new}
    rows = [fresh.pop(key(row), row) for row in old]
    return [*rows, *fresh.values()]


def training(weights: Path) -> list[dict]:
    """A row on how weights were trained, where train.py wrote it beside them."""
    said = weights / "train.json"
    if not said.exists():
        return []
    return [{"bench": "accuracy-training"} | json.loads(said.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=tiny.FOLDER)
    parser.add_argument("--n", type=int, default=500, help="pictures of a row")
    parser.add_argument("--large", type=int, default=500, help="pictures of 1600 tokens, 0: none")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--sets", default="", help="of crowded, sparse, large, by comma")
    parser.add_argument("--only", default="", help="rows whose name holds one of these, by comma")
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines, after every batch")
    parser.add_argument("--keep", action="store_true", help="keep rows of --out that are not run")
    parser.add_argument("--show", type=Path, help="print a table from rows that were written")
    args = parser.parse_args()
    if args.show:
        print(printed(read(args.show)))
        return
    jobs = [job for which, job in jobs_of(args) if not args.sets or which in args.sets.split(",")]
    groups = {row.name: row.group for row in (table.FULL, table.FIRST, *table.ROWS)}
    is_kept = args.keep and args.out and args.out.exists()
    before = read(args.out) if is_kept else []
    known, begun, made = about(args.weights), time.monotonic(), Made()
    tick = progress_bar()
    with get_context("spawn").Pool(args.jobs) as pool:
        for done, part in enumerate(pool.imap_unordered(run, jobs), 1):
            made.add(part)
            if args.out:
                new = made.rows(groups) + training(args.weights)
                rows = merged(before, [known | row for row in new])
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_text(args.out, "".join(json.dumps(row) + "\n" for row in rows))
            tick("batches", done, len(jobs))
    print(printed(made.rows(groups)))
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes, --jobs {args.jobs}")


if __name__ == "__main__":
    main()
