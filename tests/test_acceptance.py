"""Would lossless decoding pay: rounds counted along answers, and the verdict."""

import json

import pytest

import visionpulse as vp
from visionpulse import cli
from visionpulse.calibration import acceptance
from visionpulse.calibration.acceptance import (
    AcceptanceReport,
    Drafts,
    accepted_by_kind,
    accepted_of,
)
from visionpulse.data import trail

YES, NO = True, False


def test_rounds_are_counted_along_the_answers():
    assert accepted_of([[YES] * 6], 2) == (2, 4, 4)  # two drafted and the check's own, twice
    assert accepted_of([[YES] * 5], 2) == (2, 4, 4)  # the last round has no place for its own
    assert accepted_of([[NO] * 4], 3) == (4, 3 + 3 + 2 + 1, 0)
    assert accepted_of([[YES, NO, YES, YES], [YES]], 4) == (3, 4 + 2 + 1, 1 + 2 + 1)
    assert accepted_of([[]], 4) == (0, 0, 0)


def test_accepted_tokens_are_counted_by_what_they_are():
    says, kinds = [[YES, NO, YES, YES], [YES]], [["word", "sum", "word", ""], ["sum"]]
    # rounds of two: (yes, no), (yes, yes) and (yes)
    assert accepted_by_kind(says, kinds, 2) == {"sum": (2, 1), "word": (2, 2)}
    # one of four: behind a rejected token all are rejected, and the next begins behind it
    assert accepted_by_kind(says, kinds, 4) == {"sum": (2, 1), "word": (3, 2)}
    for drafted in (1, 2, 3):
        counts = accepted_by_kind(says, [["a"] * 4, ["a"]], drafted)
        assert counts == {"a": accepted_of(says, drafted)[1:]}


def test_kinds_end_with_the_right_part_of_an_answer():
    question = trail.test_set(1, 1, 8, "crowded")[0][1]
    assert question.kinds_of(question.answer) == question.kinds
    said = [*question.answer[:4], -1, *question.answer[5:], trail.END]
    assert question.kinds_of(said) == [*question.kinds[:4], *[""] * (len(said) - 4)]
    assert question.kinds_of(said[:2]) == question.kinds[:2]


def report(step, check):
    says = [[YES, YES, YES, NO] * 10]
    checks = dict.fromkeys(acceptance.DRAFTS, check)
    drafts = [
        Drafts("lookback, anchor 2", vp.PulseConfig(schedule="lookback"), 0.02, says, step, checks),
        Drafts("paper", vp.PulseConfig(), 0.1, [[NO] * 40], step, checks),
    ]
    return AcceptanceReport(1, 40, 30.0, 10.0, drafts)


def test_it_pays_where_drafts_are_cheap():
    found = report(step=1.0, check=10.0)
    best, drafted = found.best
    assert best.name.startswith("lookback") and drafted == 4  # four tokens for 14 s
    assert best.token_seconds(4) == pytest.approx((4 + 10) / 4)
    assert "it pays: lookback, anchor 2, 4 drafted tokens, 2.86x" in str(found)
    assert "8.57x the model's own" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80


def test_it_says_so_where_it_does_not_pay(tmp_path):
    found = report(step=9.0, check=20.0)
    assert "it does not pay here" in str(found) and 'vp.patch(model, "dense")' in str(found)
    data = json.loads(found.save(tmp_path / "a.json").read_text())
    rounds = data["drafts"][0]["rounds"]
    assert [each["drafted"] for each in rounds] == list(acceptance.DRAFTS)
    assert data["drafts"][0]["says"] == ["1110" * 10]


def test_the_command_measures_the_tiny_model(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(acceptance, "DRAFTS", (1, 4))
    monkeypatch.setattr(acceptance, "ROUNDS", 2)
    out = tmp_path / "a.json"
    options = ["acceptance", "--model", "tiny", "--count", "1", "--tokens", "16", "--out", str(out)]
    assert cli.main(options) == 0
    said = capsys.readouterr().out
    for kind in ("marks", "next", "sum", "word"):
        assert f"paper, anchors 2 and 4: {kind} " in said
    for way in ("lookback, anchor 2", "lookback, anchor 1", "paper, anchors 2 and 4", "paper"):
        assert way in said
    assert str(out) in said
    ways = json.loads(out.read_text())["drafts"]
    of_one, of_four = (each["by_kind"] for each in ways[0]["rounds"])
    assert of_four.keys() == {"marks", "next", "sum", "word"}
    # a check says each second token itself where one is drafted: here the words
    assert of_one.keys() == {"marks", "next", "sum"}
    assert {len(way["says"][0]) for way in ways} <= set(range(5, 16))
    assert all(way["step_seconds"] > 0 for way in ways)


def test_it_refuses_what_it_cannot_measure(capsys):
    with pytest.raises(SystemExit):
        cli.main(["acceptance", "--model", "some/model"])
    assert "--data is needed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="one row each"):
        acceptance.measure_acceptance(None, [])
