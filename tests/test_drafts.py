"""When lossless decoding pays, by hand."""

import pytest

from visionpulse.bench.drafts import ACCEPTANCES, RoundCost, line


def cost(weights=1.0, dense=1.0, draft=0.0, check=None):
    return RoundCost(lambda tokens: weights, dense, draft, check or (lambda tokens: dense))


def test_a_round_by_hand():
    found = cost(weights=2.0, dense=4.0, draft=1.0, check=lambda tokens: 5.0)
    assert found.attention_share == 2
    # 1.75 tokens for two drafts of 3 s and a check of 7 s, against 6 s a token
    assert found.speed(0.5, 2) == pytest.approx(1.75 * 6 / 13)


def test_it_pays_where_attention_outweighs_the_weights():
    assert cost(dense=0.1).best(0.9)[0] < 1.1
    assert cost(dense=10.0).best(0.9)[0] > 3
    speeds = [cost(dense=3.0).best(acceptance) for acceptance in ACCEPTANCES]
    assert speeds == sorted(speeds)
    assert [drafted for _, drafted in speeds] == sorted(drafted for _, drafted in speeds)


def test_the_note_of_the_model():
    """A 4B model, 8 rows of 32k: A/W 4.9, drafts at a thirteenth of attention."""
    speed, _ = cost(dense=4.9, draft=0.1).best(0.95)
    assert 2.4 < speed < 3.1


def test_checks_lie_on_a_line():
    check = line(1.0, 2.0, 5)
    assert (check(1), check(5), check(9)) == (1.0, 2.0, 3.0)
    assert line(2.0, 1.0, 5)(9) == 2.0  # noise makes no check cheaper than a step
