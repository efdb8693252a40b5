"""What the rows of the table say about the claims of the method, for the page and for the tests."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import rows as table

ENOUGH = 500  # pictures of a row that a claim rests on
STATIC = "static"
SAME_MEAN = "fixed 9 tokens"


class Claim(NamedTuple):
    """A sentence about rows, and whether they bear it out."""

    text: str
    holds: bool


def of_set(rows: Iterable[dict], which: str) -> dict[str, dict]:
    """The rows of a test set by their names."""
    return {row["name"]: row for row in rows if row["bench"] == "accuracy" and row["set"] == which}


def exact(row: dict) -> str:
    """A share with its interval, in percent."""
    low, high = 100 * row["exact_low"], 100 * row["exact_high"]
    return f"{100 * row['exact']:.1f} % ({low:.1f}..{high:.1f})"


def claims(rows: Iterable[dict], which: str = "crowded") -> list[Claim]:
    """What is claimed of crowded pictures."""
    here = of_set(rows, which)
    full, dynamic, fixed = here[table.FULL.name], here[table.FIRST.name], here[SAME_MEAN]
    static = [row for row in here.values() if row["group"] == STATIC]
    best = max(static, key=lambda row: row["exact"])
    kept, same = (100 * row["retention"] for row in (dynamic, fixed))
    return [
        Claim(
            f"dynamic 5pct is within 1 point of full attention: {exact(dynamic)} and {exact(full)}",
            dynamic["exact"] >= full["exact"] - 0.01,
        ),
        Claim(
            f"each of the {len(static)} static rows loses at least 30 points; the best of them, "
            f"{best['name']}, has {exact(best)}",
            best["exact"] <= full["exact"] - 0.30,
        ),
        Claim(
            f"a fixed budget of no less than the same mean ({same:.2f} % for {kept:.2f} %) loses "
            f"more than the intervals: {exact(fixed)}",
            same >= kept and fixed["exact_high"] < dynamic["exact_low"],
        ),
    ]


def listed(found: Iterable[Claim]) -> list[str]:
    """Claims as a list of Markdown."""
    return [f"- {'holds' if c.holds else '**does not hold**'}: {c.text}." for c in found]


def relied_on(rows: Iterable[dict], which: str = "crowded") -> list[dict]:
    """The rows that the claims rest on."""
    names = (table.FULL.name, table.FIRST.name, SAME_MEAN)
    return [
        row for name, row in of_set(rows, which).items() if name in names or row["group"] == STATIC
    ]


class Order(NamedTuple):
    """Pairs of rows that one model tells apart, by what another says of them."""

    same: list[tuple[str, str]]
    open: list[tuple[str, str]]  # the intervals of the other model overlap
    reversed: list[tuple[str, str]]


def order(rows: Sequence[dict], others: Sequence[dict], which: str = "crowded") -> Order:
    """Compare the order of rows in two tables; the better of each pair comes first.

    A model tells two rows apart where their intervals do not overlap.
    """
    here, there = of_set(rows, which), of_set(others, which)
    found = Order([], [], [])
    for a, b in combinations([name for name in here if name in there], 2):
        if here[a]["exact"] < here[b]["exact"]:
            a, b = b, a
        if here[a]["exact_low"] <= here[b]["exact_high"]:
            continue
        if there[a]["exact_low"] > there[b]["exact_high"]:
            found.same.append((a, b))
        elif there[b]["exact_low"] > there[a]["exact_high"]:
            found.reversed.append((a, b))
        else:
            found.open.append((a, b))
    return found


def printed(rows: Sequence[dict]) -> str:
    """The claims as a list of Markdown, and what the table took."""
    few = min(row["n"] for row in relied_on(rows))
    lines = listed(claims(rows))
    made = [row for row in rows if row["bench"] == "accuracy"]
    minutes = sum(row["spent_s"] for row in made) / 60
    lines += ["", f"The rows of these claims have {few} pictures or more; the {len(made)} rows of "
              f"the table took {minutes:.0f} minutes of one core."]  # fmt: skip
    return "\n".join(lines)


def retrained(rows: Sequence[dict], others: Sequence[dict]) -> str:
    """What another training run says of the same claims, in Markdown."""
    (training,) = (row for row in others if row["bench"] == "accuracy-training")
    made = [row for row in others if row["bench"] == "accuracy"]
    found = order(rows, made)
    total = len(found.same) + len(found.open) + len(found.reversed)
    holds = all(claim.holds for claim in claims(made))
    lines = [
        f"With `--seed {training['seed']}`, {training['steps']} steps took "
        f"{training['seconds'] / 60:.0f} minutes on one thread. The claims "
        f"{'hold' if holds else '**do not all hold**'} on its weights too "
        f"(crowded pictures, {min(row['n'] for row in made)} a row):",
        "",
        *listed(claims(made)),
        "",
        f"Of {total} pairs of rows that the shipped model tells apart (their intervals do not "
        f"overlap), {len(found.same)} have the same order here, {len(found.open)} are not told "
        f"apart, and {len(found.reversed)} are reversed"
        + ("; so the order is the same but for these:" if found.reversed else "."),
    ]  # fmt: skip
    if found.reversed:
        lines += ["", *(f"- {b} is above {a} here." for a, b in found.reversed)]
    here = of_set(rows, "crowded")
    lines += ["", "| | shipped | retrained |", "|---|---|---|"]
    lines += [f"| {row['name']} | {exact(here[row['name']])} | {exact(row)} |" for row in made]
    return "\n".join(lines)


FRONT = (
    table.FULL.name, table.FIRST.name, SAME_MEAN, "fixed 1 %", "random tokens 10 %",
    "FastV 10 %", "VisionZip 10 %", "LOOK-M 10 %", "LOOK-M 50 %",
)  # fmt: skip


def front(rows: Sequence[dict]) -> str:
    """A few rows for the README, in Markdown."""
    here = of_set(rows, "crowded")
    few = min(here[name]["n"] for name in FRONT)
    lines = ["| | visual tokens kept | answers right (95 %) |", "|---|---|---|"]
    for name in FRONT:
        share = here[name]["retention"]
        kept = "all" if share is None else f"{100 * share:.2f} %"
        lines.append(f"| {name} | {kept} | {exact(here[name])} |")
    lines += ["", f"{few} pictures that training has not seen, on the CPU kernels: "
              "`python benchmarks/accuracy/table.py`"]  # fmt: skip
    return "\n".join(lines)
