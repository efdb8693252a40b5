"""The latency model is a plain function: more of anything is never faster."""

import pytest

from visionpulse.bench.latency import H200, Chain, Launched, in_flight, predict

CHAIN = Chain(33, 8, 3, 7, 3000, 2000.0, 700.0, 5000, 8000)
LAUNCHED = Launched(264, 2, 4, 68e6)


def seconds(chain=CHAIN, launched=LAUNCHED, **options):
    return predict(chain, launched, **options).seconds


@pytest.mark.parametrize("name", ("tiles", "head", "tile", "finish", "merge"))
def test_a_longer_chain_is_no_faster(name):
    longer = CHAIN._replace(**{name: 2 * getattr(CHAIN, name)})
    assert seconds(longer, Launched(2640, 2, 4, 0.0)) > seconds(CHAIN, Launched(2640, 2, 4, 0.0))


def test_bytes_bound_what_the_chain_does_not():
    assert seconds(launched=LAUNCHED._replace(bytes=1.0)) < seconds()
    many = LAUNCHED._replace(bytes=1e9)
    assert predict(CHAIN, many).body == pytest.approx(1e9 / H200.copy)


def test_blocks_that_do_not_fit_take_turns():
    empty = LAUNCHED._replace(bytes=0.0)
    assert seconds(launched=empty) == seconds(launched=empty._replace(blocks=100))
    assert seconds(launched=empty._replace(blocks=528)) > 1.4 * seconds(launched=empty)


def test_a_chained_launch_costs_less():
    saved = seconds() - seconds(chained=True)
    assert saved == pytest.approx(H200.launch - H200.chained)


def test_no_more_tiles_are_in_flight_than_a_warp_has():
    assert in_flight(1, 3, 8704, 8) == 8 * 8704
    assert in_flight(8, 3, 8704, 8) == 2 * 8 * 8704
