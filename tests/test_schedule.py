"""Roles of layers, from the text of the contract's section on schedules."""

import pytest

import visionpulse as vp
from visionpulse.schedule import Role, anchors, default_anchor, roles

D, A, F, M = Role.DENSE, Role.ANCHOR, Role.FOLLOWER, Role.MODEL
ALL = (True,) * 6


def test_the_default_anchor_is_17_of_36():
    assert default_anchor([True] * 36) == 17
    assert default_anchor([True] * 28) == 13
    assert default_anchor([True]) == 0


@pytest.mark.parametrize(
    "full, layer",
    [
        ([i % 4 == 3 for i in range(36)], 19),  # the next full layer after 17
        ([i < 4 for i in range(36)], 3),  # none after: the last before
    ],
)
def test_the_default_anchor_lies_on_a_full_attention_layer(full, layer):
    assert default_anchor(full) == layer


def test_paper():
    assert roles(vp.PulseConfig(anchor=2), ALL, step=5) == (D, D, A, F, F, F)


def test_several_anchors():
    assert roles(vp.PulseConfig(anchor=(1, 3)), ALL, step=0) == (D, A, F, A, F, F)


def test_per_layer():
    assert roles(vp.PulseConfig(schedule="per_layer"), ALL, step=3) == (A,) * 6


def test_dense():
    assert roles(vp.PRESETS["dense"], ALL, step=3) == (D,) * 6
    assert roles(vp.PRESETS["dense"], (False, True) * 3, step=0) == (M, D) * 3
    assert anchors(vp.PRESETS["dense"], ALL) == ()


def test_layers_of_other_kinds_stay_with_the_model():
    full = (False, True, False, True, False, True)
    assert roles(vp.PulseConfig(anchor=3), full, step=0) == (M, D, M, A, M, F)
    assert roles(vp.PulseConfig(schedule="per_layer"), full, step=0) == (M, A, M, A, M, A)


@pytest.mark.parametrize(
    "refresh, dense_steps", [(0, {0}), (1, set(range(8))), (3, {0, 3, 6}), (8, {0})]
)
def test_lookback_is_dense_at_first_and_at_every_refresh(refresh, dense_steps):
    config = vp.PulseConfig(anchor=2, schedule="lookback", refresh=refresh)
    for step in range(8):
        early = D if step in dense_steps else F
        assert roles(config, ALL, step) == (early, early, A, F, F, F)


def test_an_anchor_that_is_not_full_attention_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"anchor 2 .* 1, 3, 5"):
        anchors(vp.PulseConfig(anchor=2), (False, True, False, True, False, True))
    with pytest.raises(ValueError, match="anchor 99"):
        anchors(vp.PulseConfig(anchor=99), ALL)
    with pytest.raises(ValueError, match="no full-attention layer"):
        anchors(vp.PulseConfig(), (False, False))
