"""Calibration: its parts on made-up observations, the whole on the tiny model from a bad start."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import visionpulse as vp
from visionpulse.calibration import float8
from visionpulse.calibration import suggest as calibration
from visionpulse.calibration.float8 import Float8Trial
from visionpulse.calibration.observe import TAUS, Observation
from visionpulse.calibration.suggest import (
    GRID,
    LOST,
    Calibration,
    Trial,
    calibrate,
)
from visionpulse.config import resolve
from visionpulse.data import tiny, trail

# Pictures to calibrate on, and others to judge the suggestion by.
PICTURES, OTHERS = 32, 40


def observation(mass, captured, mass_of_tau=None):
    """E entries and L layers: mass [E, L], captured [E, L, L, GRID] broadcast."""
    mass = np.asarray(mass, np.float32)
    entries, layers = mass.shape
    sharp = np.repeat(mass[..., None], len(TAUS), 2) if mass_of_tau is None else mass_of_tau
    captured = np.broadcast_to(captured, (entries, layers, layers, len(GRID)))
    return Observation(
        tuple(range(layers)), TAUS, (0.001,), GRID, np.zeros(entries, int), np.arange(entries),
        np.full(entries, 400), sharp, mass, np.zeros((entries, layers, 1), int),
        np.ones((entries, layers, layers), np.float32), captured.astype(np.float32),
        np.zeros((1, layers, 1), np.float32), ((1, 2),),
    )  # fmt: skip


def test_lost_attention_is_what_followers_cannot_see():
    captured = np.zeros((2, 3, 3, len(GRID)))
    captured[0, 0, 1], captured[0, 0, 2] = 0.5, 1.0
    captured[1, 0, 1], captured[1, 0, 2] = 0.9, 0.8
    seen = observation([[0.3, 0.4, 0.6], [0.3, 0.1, 0.2]], captured)
    lost = calibration._lost(seen, 0)
    assert lost[0, 0] == pytest.approx((0.4 * 0.5 + 0.6 * 0.0) / 2)
    assert lost[1, 0] == pytest.approx((0.1 * 0.1 + 0.2 * 0.2) / 2)


def test_need_is_the_smallest_ratio_that_loses_little():
    held = np.linspace(0, 1, len(GRID))  # of the grid's ratios, in order
    seen = observation([[0.5, 0.5], [0.03, 0.03], [0.0, 0.0]], held)
    need = calibration._need(seen, 0)
    for entry, mass in enumerate((0.5, 0.03, 0.0)):
        enough = [
            ratio for ratio, share in zip(GRID, held, strict=True) if mass * (1 - share) <= LOST
        ]
        assert need[entry] == enough[0]


def test_the_tau_that_follows_the_need_is_found():
    entries = 40
    busy = np.arange(entries) % 4 == 0
    mass = np.where(busy, 0.6, 0.01)[:, None] * np.ones((1, 2))
    by_tau = np.ones((entries, 2, len(TAUS)), np.float32)  # always one: says nothing
    by_tau[:, :, TAUS.index(0.2)] = np.where(busy, 0.9, 0.0)[:, None]
    held = np.linspace(0, 1, len(GRID))
    seen = observation(mass, held, by_tau)
    found = {tau: calibration._follows(seen, 0, tau, (0.01, 0.1)) for tau in TAUS}
    assert max(found, key=found.get) == 0.2 and found[0.2] > 0.99
    assert found[1.0] == 0.0
    names = calibration._candidates(seen, {0: 0.1}, vp.PulseConfig())
    assert any(config.tau == 0.2 for config in names.values())
    assert {c.tau for c in names.values()} >= {vp.PRESETS["5pct"].tau, vp.PRESETS["10pct"].tau}


def trial(name, agree, distance, retention, steps=1000, anchor=2):
    config = vp.PulseConfig(anchor=anchor, ratio=(0.0, retention))
    return Trial(config, name, steps, round(steps * (1 - agree)), distance, retention)


def test_the_best_keeps_fewest_of_those_that_do_as_well():
    trials = [
        trial("all", 1.0, 0.0005, 0.5),
        trial("good", 0.999, 0.002, 0.05),
        trial("far", 0.999, 0.3, 0.02),  # writes the same, but is no longer sure of it
        trial("bad", 0.9, 0.2, 0.01),
    ]
    assert calibration._best(trials).name == "good"
    assert calibration._best(trials[2:]).name == "far"


def test_it_says_when_it_is_not_sure():
    seen = observation([[0.5, 0.5]], 1.0)
    good, few = trial("a", 1.0, 0.0, 0.1), trial("b", 1.0, 0.0, 0.1, steps=20)
    assert not calibration._remarks(seen, [good], good)
    assert "only 20 steps" in calibration._remarks(seen, [few], few)[0]
    bad = trial("c", 0.9, 0.5, 0.1)
    assert "another token in 10.0 %" in calibration._remarks(seen, [bad], bad)[0]
    blind = observation([[0.0, 0.0]], 1.0)
    assert "hardly looks" in calibration._remarks(blind, [good], good)[0]


def test_a_saved_suggestion_is_a_config_again(tmp_path):
    trials = [trial("a", 0.99, 0.01, 0.1), trial("b", 1.0, 0.001, 0.3)]
    seen = observation([[0.5, 0.5]], 1.0)
    made = Calibration(trials[1].config, trials, {0: 0.1}, {0.4: 0.9}, seen, ["few"])
    path = made.save(tmp_path / "config.json")
    assert vp.load_config(path) == made.config == resolve(str(path))
    assert json.loads(path.read_text())["about"]["sure"] is False
    text = made.report()
    assert "Do not rely on it yet: few." in text and "*b" in text and "95 %" in text
    pytest.importorskip("matplotlib")
    assert made.plot(tmp_path / "pareto.png").stat().st_size > 5_000


def test_a_schedule_that_breaks_the_model_is_named(tmp_path):
    best = trial("best", 0.99, 0.001, 0.05)
    bears = trial("lookback, anchor 1", 0.998, 0.002, 0.05)
    slips = trial("anchors 2 and 4", 0.97, 0.002, 0.05, steps=30)  # may be chance
    breaks = trial("lookback, anchor 2", 0.79, 0.4, 0.05)
    seen = observation([[0.5, 0.5]], 1.0)
    made = Calibration(best.config, [best], {0: 0.1}, {0.4: 0.9}, seen, [], [bears, slips, breaks])
    assert made.breaking == [breaks] and made.is_sure  # the suggestion itself is as sure as ever
    lines = [line for line in made.report().splitlines() if line.endswith("breaks this model")]
    assert len(lines) == 1 and lines[0].startswith(" lookback, anchor 2 ")
    about = json.loads(made.save(tmp_path / "config.json").read_text())["about"]
    assert about["breaking"] == ["lookback, anchor 2"]
    assert [t["name"] for t in about["schedules"]] == [bears.name, slips.name, breaks.name]


@pytest.mark.parametrize("agree, breaks", [(0.995, False), (0.9, True)])
def test_a_cache_of_8_bits_is_in_the_setting_if_the_model_bears_it(tmp_path, agree, breaks):
    best = trial("best", 0.99, 0.001, 0.05)
    small = Float8Trial(
        trial("with a cache of 8 bits", agree, 0.002, 0.05), 0.97, 0.75, 0.925, 0.6, 3
    )
    assert small.breaks(best) is breaks
    config = best.config if breaks else best.config.updated(cache="fp8")
    seen = observation([[0.5, 0.5]], 1.0)
    made = Calibration(config, [best], {0: 0.1}, {0.4: 0.9}, seen, [], [], small)
    assert made.chosen is best and "*best" in made.report()
    last = made.report().split("\n\n")[-1].replace("\n", " ")
    assert "92.5 % of a step's kept tokens stay, 97.00 % of steps and 75.0 % of answers" in last
    assert "3 numbers were clamped" in last
    assert last.endswith("breaks this model: the setting leaves it out.") is breaks
    path = made.save(tmp_path / "config.json")
    assert vp.load_config(path).cache == ("model" if breaks else "fp8")
    assert json.loads(path.read_text())["about"]["float8"]["kept"] == 0.925


def test_kept_tokens_are_compared_in_the_steps_of_answers():
    said = [torch.tensor([[5, 6, -1], [5, 6, 7]])]
    other = [torch.tensor([[5, 9, -1], [5, 6, 7]])]
    assert list(float8._agreement(said, other)) == [[True, False], [True, True, True]]
    rows = [SimpleNamespace(conversation=4, row=row, step=step, layer=2, kept=np.array([1, step]))
            for row in (0, 1) for step in range(3)]  # fmt: skip
    kept = float8._kept(rows, said)
    assert set(kept) == {(0, 0, 0, 2), (0, 0, 1, 2), (0, 1, 0, 2), (0, 1, 1, 2), (0, 1, 2, 2)}
    changed = kept | {(0, 1, 2, 2): frozenset([2, 9])}
    assert float8._shares(kept, changed) == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_the_schedules_that_are_tried_keep_the_setting():
    seen = observation([[0.5] * 6], 1.0)
    config = vp.PulseConfig(anchor=2, tau=0.2, ratio=(0.01, 0.07))
    tried = calibration._schedules(seen, config)
    assert list(tried) == ["lookback, anchor 2", "lookback, anchor 1", "anchors 2 and 4"]
    for changed in tried.values():
        assert changed.updated(anchor=2, schedule="paper") == config
    first = calibration._schedules(seen, config.updated(anchor=0))
    assert list(first) == ["lookback, anchor 0", "anchors 0 and 3"]
    last = calibration._schedules(seen, config.updated(anchor=4))  # layer 5 must follow
    assert list(last) == ["lookback, anchor 4", "lookback, anchor 3"]


def test_a_file_that_is_no_suggestion_is_refused(tmp_path):
    path = tmp_path / "other.json"
    with pytest.raises(ValueError, match=r"no file .*other.json; `visionpulse calibrate"):
        resolve(str(path))
    for text, message in (
        ("{}", "holds no config"),
        ("[1]", "holds no config"),
        ("tau: 1", "is no JSON"),
        ('{"config": {"tau": -1}}', "tau must be finite and > 0"),
        ('{"config": {"taus": 1}}', "no field 'taus'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            resolve(str(path))


def test_calibrate_is_imported_when_asked_for():
    code = "import sys, visionpulse as vp; assert 'visionpulse.calibration' not in sys.modules; "
    code += "vp.calibrate; assert 'visionpulse.calibration.suggest' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert vp.calibrate is calibrate
    with pytest.raises(AttributeError, match="no attribute 'calibrated'"):
        vp.calibrated  # noqa: B018


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    return tiny.load()


def right(model, config, drawn):
    given = tiny.inputs_of(drawn)
    with vp.patch(model, config):
        out = model.generate(**given, do_sample=False, max_new_tokens=64)
    rows = out[:, given["input_ids"].shape[1] :].tolist()
    wanted = [question.answer for _, question in drawn]
    return sum(tiny.until_end(row) == want for row, want in zip(rows, wanted, strict=True))


@pytest.mark.deep
def test_it_finds_a_good_setting_from_a_bad_start(model):
    """A temperature and bounds that leave one token in every step, on the wrong layer."""
    bad = vp.PulseConfig(anchor=0, tau=1e-3, ratio=(0.0, 0.004))
    drawn = trail.test_set(31, PICTURES, tiny.SIDE, "crowded")
    inputs = [tiny.inputs_of(drawn[i : i + 8]) for i in range(0, PICTURES, 8)]
    found = calibrate(model, inputs, start=bad, cache="fp8")
    start = next(t for t in found.trials if t.name == "start")
    assert found.chosen.agreement > start.agreement
    assert found.chosen.distance < start.distance / 10
    # judged on pictures that calibration has not seen
    other = trail.test_set(32, OTHERS, tiny.SIDE, "crowded")
    given = tiny.inputs_of(other)
    out = model.generate(**given, do_sample=False, max_new_tokens=64)
    rows = out[:, given["input_ids"].shape[1] :].tolist()
    dense = sum(
        tiny.until_end(row) == question.answer
        for row, (_, question) in zip(rows, other, strict=True)
    )
    assert right(model, bad, other) < dense / 2
    assert right(model, found.config, other) >= dense - 2
    assert found.chosen.retention < 0.2
    small = found.float8
    assert small.trial.steps == found.chosen.steps and found.config.cache == "fp8"
    assert 0.5 < small.kept < 1 and small.same < small.kept and small.answers <= small.steps <= 1
    assert small.trial.distance != found.chosen.distance
    assert [t.steps for t in found.schedules] == [found.chosen.steps] * len(found.schedules)
    # such a late anchor leaves the look-ups of a step with what the last one kept
    late = [
        t for t in found.schedules if t.config.schedule == "lookback" and found.config.anchor == 4
    ]
    assert found.schedules and all(t in found.breaking for t in late)


def test_the_dense_setting_is_no_distance_away(model):
    drawn = trail.test_set(41, 3, tiny.SIDE, "crowded")
    inputs = [tiny.inputs_of(drawn)]
    seen = calibration.observe(model, inputs, max_new_tokens=40, taus=TAUS, ratios=GRID)
    forced = calibration.ForcedAnswers(model, inputs, seen, {})
    everything = forced.run("all", vp.PulseConfig(anchor=2, ratio=(1.0, 1.0)))
    nothing = forced.run("one", vp.PulseConfig(anchor=2, budget=vp.TopK(1)))
    assert everything.differs == 0 and everything.retention == 1.0
    assert everything.distance < 1e-6 < nothing.distance
    # as many steps as the answers have tokens after the first
    assert everything.steps == sum(len(answer) - 1 for answer in seen.answers)


def test_the_forced_path_is_followed(model):
    """Another answer forced on the same prompt gives the logits of a plain forward over it."""
    drawn = trail.test_set(43, 2, tiny.SIDE, "crowded")
    given = tiny.inputs_of(drawn)
    seen = calibration.observe(model, given, max_new_tokens=12, taus=TAUS, ratios=GRID)
    path = ((8, 45, 9, 30, 10, 22, 8), (8, 40, 9, 31))
    seen = type(seen)(**{**vars(seen), "answers": path})
    forced = calibration.ForcedAnswers(model, [given], seen, {})
    rows = torch.tensor([[*path[0]], [*path[1], 31, 31, 31]])
    ids = torch.cat([given["input_ids"], rows], 1)
    with torch.no_grad():
        whole = model(**(given | {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == trail.IMAGE).int(),
        })).logits.log_softmax(-1)  # fmt: skip
    size = given["input_ids"].shape[1]
    for row, answer in enumerate(path):
        steps = len(answer) - 1
        torch.testing.assert_close(
            forced.dense[0][row, :steps], whole[row, size : size + steps], rtol=1e-4, atol=1e-4
        )
