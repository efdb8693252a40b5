"""A second checkpoint, which looks things up before the default anchor: what breaks it is said.

`early_looker/` was trained by benchmarks/accuracy/train.py with `--late`, which makes looking late
dear; `train.json` says how. On it the selection of the last step blinds the layers that look.
"""

from pathlib import Path

import pytest
import torch

import visionpulse as vp
from visionpulse.calibration.suggest import calibrate
from visionpulse.data import tiny, trail

FOLDER = Path(__file__).with_name("early_looker")
SIDE, ANCHOR = 12, 2
PAPER = vp.PulseConfig(anchor=ANCHOR, ratio=(0.1, 0.1))
LOOKBACK = PAPER.updated(schedule="lookback")


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return tiny.load(FOLDER)


def answers(model, drawn, **options):
    inputs = tiny.inputs_of(drawn)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=trail.LONGEST_ANSWER, **options)
    return [tiny.until_end(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]


def test_the_default_anchor_serves_paper_and_not_lookback(model):
    drawn = trail.test_set(5, 24, SIDE, "sparse")
    full = answers(model, drawn)
    right = sum(said == question.answer for said, (_, question) in zip(full, drawn, strict=True))
    assert right >= 20

    def same(config):
        with vp.patch(model, config):
            return sum(a == b for a, b in zip(answers(model, drawn), full, strict=True))

    assert same(PAPER) >= 23
    assert same(LOOKBACK) <= 18
    assert same(LOOKBACK.updated(anchor=ANCHOR - 1)) >= 22


@pytest.mark.deep
def test_calibration_names_the_schedule_that_breaks_it(model):
    drawn = trail.test_set(6, 16, SIDE, "sparse")
    inputs = [tiny.inputs_of(drawn[i : i + 8]) for i in (0, 8)]
    found = calibrate(model, inputs, start=PAPER)
    names = {trial.name for trial in found.breaking}
    assert f"lookback, anchor {found.config.anchor}" in names or found.config.anchor < ANCHOR
    assert any("lookback" in name for name in names), [t.name for t in found.schedules]


def test_lossless_decoding_stays_exact_and_leaves_what_is_not_accepted(model):
    drawn = trail.test_set(7, 1, SIDE, "sparse")
    for config in (PAPER, LOOKBACK):
        full = answers(model, drawn)
        with vp.patch(model, config, lossless=True) as session:
            assert answers(model, drawn) == full
        assert session.stats.steps > 0
