"""How often a step finds what it wants: counted by hand on small traces."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from visionpulse.models import Trace
from visionpulse.trace.reuse import reuse


def trace_of(kept, rows=None, layers=None, conversations=None):
    n, zeros = len(kept), [0] * len(kept)
    mass = np.full(n, 0.5)
    return Trace(
        conversation=np.array(conversations or zeros), step=np.arange(n),
        layer=np.array(layers or zeros), row=np.array(rows or zeros), token=np.arange(n),
        n_visual=np.full(n, 16), mass=mass, mass_mean=mass,
        ends=np.cumsum([len(k) for k in kept]),
        positions=np.array([p for k in kept for p in k], np.int64), spans={}, about={},
    )  # fmt: skip


def holds(size: int) -> Callable[[int], int]:
    return lambda n_visual: size


def test_a_step_is_compared_with_the_one_before():
    seen = reuse(trace_of([[1, 2], [2, 3], [4], [4]]), [holds(16)])
    assert seen.wanted.tolist() == [2, 2, 1, 1]
    assert seen.again.tolist() == [-1, 1, 0, 1]
    assert seen.overlap() == 2 / 4  # the first step finds nothing and is not counted
    assert seen.overlap(np.array([True, True, False, False])) == 1 / 2


def test_the_token_that_was_asked_for_longest_ago_leaves():
    # 1 is asked for again before the cache of two overflows, so 2 leaves
    seen = reuse(trace_of([[1], [2], [1], [3], [1], [2]]), [holds(2), holds(3)])
    assert seen.hits.tolist() == [[-1, -1], [0, 0], [1, 1], [0, 0], [1, 1], [0, 1]]
    assert seen.hit_rates() == [2 / 5, 3 / 5]


def test_a_cache_of_one_step_hits_what_overlaps():
    seen = reuse(trace_of([[1, 2], [2, 3], [3, 4], [1, 4]]), [holds(2)])
    assert seen.hits[1:, 0].tolist() == seen.again[1:].tolist() == [1, 1, 1]


def test_rows_layers_and_conversations_have_caches_of_their_own():
    kept = [[1], [1], [1], [1]]
    apart = [{"rows": [0, 1, 2, 3]}, {"layers": [0, 1, 2, 3]}, {"conversations": [0, 1, 2, 3]}]
    for by in apart:
        seen = reuse(trace_of(kept, **by), [holds(4)])
        assert not seen.follows.any() and math.isnan(seen.overlap())
    assert reuse(trace_of(kept), [holds(4)]).hits[1:, 0].tolist() == [1, 1, 1]


def test_the_size_of_a_cache_follows_the_visual_tokens():
    asked = []
    reuse(trace_of([[1], [2]]), [lambda n: asked.append(n) or 4])
    assert asked == [16]
    with pytest.raises(ValueError, match="a token at least, got 0"):
        reuse(trace_of([[1]]), [holds(0)])
