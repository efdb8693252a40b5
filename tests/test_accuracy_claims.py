"""The claims of the method, read off the committed rows; and what reads them, on made-up rows."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from visionpulse.data import tiny

ROOT = Path(__file__).resolve().parent.parent
ACCURACY, RESULTS = ROOT / "benchmarks" / "accuracy", ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def claims():
    """benchmarks/accuracy/claims.py, of a folder of scripts."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ACCURACY))
    try:
        spec = importlib.util.spec_from_file_location("accuracy_claims", ACCURACY / "claims.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ACCURACY))
        for other in ("measure", "rows"):
            sys.modules.pop(other, None)


def read(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def row(name, exact, group="", half=0.02, n=500, retention=None):
    return {
        "bench": "accuracy", "set": "crowded", "name": name, "group": group, "n": n,
        "exact": exact, "exact_low": exact - half, "exact_high": exact + half,
        "retention": retention, "spent_s": 60.0,
    }  # fmt: skip


def table(**changes):
    """Rows that bear out every claim, but for the changes of a row's `exact` or other fields."""
    rows = [
        row("full attention", 0.98),
        row("dynamic 5pct", 0.98, retention=0.0221),
        row("fixed 9 tokens", 0.85, retention=0.0225),
        row("FastV 50 %", 0.3, "static"),
        row("LOOK-M 50 %", 0.5, "static"),
    ]
    return [r | changes.get(r["name"], {}) for r in rows]


def test_a_claim_fails_with_the_rows_it_rests_on(claims):
    def held(**changes):
        return [claim.holds for claim in claims.claims(table(**changes))]

    assert held() == [True, True, True]
    assert held(**{"dynamic 5pct": {"exact": 0.971}}) == [True, True, True]
    assert held(**{"dynamic 5pct": {"exact": 0.969}}) == [False, True, True]
    assert held(**{"FastV 50 %": {"exact": 0.69}}) == [True, False, True]
    # no less kept, and intervals apart
    assert held(**{"fixed 9 tokens": {"retention": 0.0220}}) == [True, True, False]
    assert held(**{"fixed 9 tokens": {"exact_high": 0.961}}) == [True, True, False]
    text = claims.printed(table(**{"dynamic 5pct": {"exact": 0.5, "n": 20}}))
    assert "**does not hold**: dynamic 5pct is within 1 point" in text
    assert "have 20 pictures or more; the 5 rows of the table took 5 minutes" in text


def test_an_order_is_of_rows_whose_intervals_are_apart(claims):
    here = [row("a", 0.9), row("b", 0.5), row("c", 0.48), row("d", 0.1), row("only here", 0.3)]
    there = [row("a", 0.9), row("b", 0.2), row("c", 0.2), row("d", 0.21), row("only there", 0.3)]
    found = claims.order(here, there)
    assert found.same == [("a", "b"), ("a", "c"), ("a", "d")]  # b and c were never told apart
    assert found.open == [("b", "d"), ("c", "d")] and not found.reversed
    there[1] = row("b", 0.05)
    assert claims.order(here, there).reversed == [("b", "d")]
    training = {"bench": "accuracy-training", "seed": 1, "steps": 10, "seconds": 120}
    other = [r | {"exact": 0.9} if r["name"] == "LOOK-M 50 %" else r for r in table()]
    other[-1] |= {"exact_low": 0.88, "exact_high": 0.92}
    text = claims.retrained(table(), [*other, training])
    assert "10 steps took 2 minutes" in text and "**do not all hold**" in text
    assert (
        "and 1 are reversed; so the order" in text
        and "- LOOK-M 50 % is above fixed 9 tokens here." in text
    )


def test_the_committed_rows_bear_out_the_claims(claims):
    rows = read("accuracy.jsonl")
    for claim in claims.claims(rows):
        assert claim.holds, claim.text
    for found in claims.relied_on(rows):
        assert found["n"] >= claims.ENOUGH, found["name"]
    names = {found["name"] for found in claims.relied_on(rows)}
    # every static method at every ratio of the table
    assert names >= {f"{m} {r} %" for m in ("FastV", "VisionZip", "LOOK-M") for r in (5, 10, 50)}


def test_the_committed_rows_are_of_the_whole_table(claims):
    rows = read("accuracy.jsonl")
    wanted = {
        "crowded": [r.name for r in (claims.table.FULL, claims.table.FIRST, *claims.table.ROWS)],
        "sparse": list(claims.table.SPARSE),
        "large": list(claims.table.LARGE),
    }
    for which, names in wanted.items():
        assert set(claims.of_set(rows, which)) == set(names)
    for found in rows:
        assert found["n"] == len(found["right"]) and found["right"].count("1") == round(
            found["exact"] * found["n"]
        )
        low, high = round(found["exact_low"], 9), round(found["exact_high"], 9)
        assert low <= found["exact"] <= high
    assert not {found["commit"] for found in rows if found["commit"].endswith("-dirty")}


def test_another_training_run_bears_out_the_claims(claims):
    rows, others = read("accuracy.jsonl"), read("accuracy-retrained.jsonl")
    (training,) = (r for r in others if r["bench"] == "accuracy-training")
    made = [r for r in others if r["bench"] == "accuracy"]
    assert training["seed"] == 1 and not training["resumed"]
    assert training["seconds"] < 45 * 60
    assert not {r["weights"] for r in rows} & {r["weights"] for r in made}
    for claim in claims.claims(made):
        assert claim.holds, claim.text
    assert min(r["n"] for r in made) >= 200


def test_no_control_answers_by_chance(claims):
    """A model that does not look, or looks anywhere, is right on next to no picture."""
    here = claims.of_set(read("accuracy.jsonl"), "crowded")
    for name in ("blind: no visual token in decode", "random tokens 5 %", "random tokens 10 %"):
        assert here[name]["exact_high"] < 0.05, name
    assert here["none after the anchor"]["exact_high"] < here["dynamic 5pct"]["exact_low"]


def test_the_rows_are_of_the_shipped_weights(claims):
    import hashlib

    digest = hashlib.sha256((tiny.FOLDER / "model.safetensors").read_bytes()).hexdigest()[:12]
    assert {found["weights"] for found in read("accuracy.jsonl")} == {digest}


def test_lossless_rows_are_equal_and_stand_on_their_page():
    """No picture's answer may differ from that of full attention, whatever drafts."""
    pytest.importorskip("transformers")
    rows = read("accuracy-lossless.jsonl")
    assert all(row["equal"] == row["n"] for row in rows)
    assert {(row["n"], row["temperature"] > 0) for row in rows} >= {(500, False), (100, True)}
    page = (ROOT / "docs" / "lossless.md").read_text()
    for row in rows:
        cells = f"{row['equal']} of {row['n']} | {100 * row['acceptance']:.1f} % |"
        what = f"| {row['draft']} | {row['set']} | {row['batch']} | {row['tokens']} |"
        assert what in page and cells in page


def test_acceptance_by_kind_has_every_row(claims):
    """Of every draft, on crowded, sparse and large pictures."""
    sys.path.insert(0, str(ACCURACY))
    try:
        import acceptance
    finally:
        sys.path.remove(str(ACCURACY))
        for name in ("acceptance", "lossless", "measure", "table", "rows"):
            sys.modules.pop(name, None)
    rows = read("accuracy-acceptance.jsonl")
    found = {(row["set"], row["draft"]) for row in rows}
    assert found == {(which, name) for which in acceptance.COUNTS for name in acceptance.WAYS}
    assert {row["tokens"] for row in rows} == set(acceptance.DRAFTS)
    assert all(0 <= row["accepted"] <= row["drafted"] for row in rows)
