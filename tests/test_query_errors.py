"""Every bad call of several queries gets one clear error, before anything is written."""

import pytest
import torch

import visionpulse as vp
from visionpulse.testing import assert_clear_error

B, Q, H, G, N, D = 2, 3, 8, 2, 40, 16
KV = vp.KVCache(torch.zeros(B, G, N, D), torch.zeros(B, G, N, D))
VISUAL = vp.VisualTokens.from_spans([[(3, N)]] * B)
ONE = torch.zeros(B, H, D)
SEVERAL = torch.zeros(B, Q, H, D)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def decode(q=SEVERAL, **options):
    return vp.decode(q, KV, VISUAL, **options)


def select(scores, mass, **options):
    return vp.select(scores, mass, VISUAL, **options)


def selection(rows):
    zeros = torch.zeros(rows)
    return vp.Selection(torch.full((rows, 1), 3).int(), zeros.int(), zeros, zeros)


# name: (call, kind of error, words of the message: what was expected or came, and the way out)
TABLE = {
    "q of transformers": (
        lambda: decode(torch.zeros(B, H, 1, D)),
        ValueError,
        ["H=1 and G=2", "[B, Q, H, D]", "transpose(1, 2)"],
    ),
    "too many queries": (
        lambda: decode(torch.zeros(B, 17, H, D)),
        ValueError,
        ["1 to 16", "Q=17", "several calls"],
    ),
    "no query": (lambda: decode(torch.zeros(B, 0, H, D)), ValueError, ["1 to 16", "Q=0"]),
    "counts of one query": (
        lambda: decode(ONE, q_counts=i32(1, 1)),
        ValueError,
        ["q_counts", "[B, Q, H, D]", "(2, 8, 16)", "leave it out"],
    ),
    "counts beyond": (
        lambda: decode(q_counts=i32(3, 4)),
        ValueError,
        ["q_counts", "0..3", "4"],
    ),
    "counts of another dtype": (
        lambda: vp.attend(SEVERAL, KV, q_counts=torch.tensor([1, 2])),
        TypeError,
        ["q_counts", "int32", "int64"],
    ),
    "counts of other rows": (
        lambda: vp.score(SEVERAL, KV, VISUAL, q_counts=i32(1)),
        ValueError,
        ["q_counts", "per row", "1 for B=2"],
    ),
    "scores of one query": (
        lambda: decode(scores=torch.zeros(B, N)),
        ValueError,
        ["scores", "(2, 3, 40)", "(2, 40)"],
    ),
    "out of one query": (
        lambda: decode(out=torch.zeros(B, H, D)),
        ValueError,
        ["out", "(2, 3, 8, 16)", "(2, 8, 16)"],
    ),
    "selection of one query": (
        lambda: vp.attend(SEVERAL, KV, VISUAL, selection(B)),
        ValueError,
        ["[6, K_max", "(2, 1)"],
    ),
    "mass of other queries": (
        lambda: select(torch.zeros(B, Q, N), torch.zeros(B, 2)),
        ValueError,
        ["mass", "(2, 3)", "(2, 2)"],
    ),
    "select with counts beyond": (
        lambda: select(torch.zeros(B, Q, N), torch.zeros(B, Q), q_counts=i32(0, 4)),
        ValueError,
        ["q_counts", "0..3"],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_gets_one_clear_error(name):
    assert_clear_error(*TABLE[name])


def test_an_error_leaves_the_output_alone():
    out = torch.full_like(SEVERAL, 7.0)
    with pytest.raises(ValueError, match="q_counts"):
        decode(out=out, q_counts=i32(4, 1))
    assert (out == 7).all()
