"""Every bad input gets one clear error: what was expected, what came, the way out."""

import math

import pytest
import torch

import visionpulse as vp
from visionpulse.testing import assert_clear_error

B, H, G, N, D = 2, 8, 2, 40, 16


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make_q(rows=B, heads=H, dim=D, dtype=torch.float32):
    return torch.zeros(rows, heads, dim, dtype=dtype)


def make_kv(**changes):
    tensors = {"k": torch.zeros(B, G, N, D), "v": torch.zeros(B, G, N, D)}
    return vp.KVCache(**(tensors | changes))


def make_paged(**changes):
    pages = torch.zeros(9, 16, G, D)
    fields = {
        "k_pages": pages,
        "v_pages": pages.clone(),
        "block_table": i32(0, 1, 2, 3, 4, 5).view(2, 3),
        "lengths": i32(40, 33),
    }
    return vp.PagedKVCache(**(fields | changes))


def make_visual(rows=B, size=N):
    return vp.VisualTokens.from_spans([[(3, size)]] * rows)


def decode(q=None, kv=None, visual=None, config="10pct", **options):
    q, kv = make_q() if q is None else q, make_kv() if kv is None else kv
    return vp.decode(q, kv, make_visual() if visual is None else visual, config, **options)


def make_selection(indices=None, counts=None):
    indices = i32(3, 4, -1, 5, 6, 7).view(2, 3) if indices is None else indices
    counts = i32(2, 3) if counts is None else counts
    return vp.Selection(indices, counts, torch.zeros(2), torch.zeros(2))


def follow(indices=None, counts=None):
    return vp.attend(make_q(), make_kv(), make_visual(), make_selection(indices, counts))


def select(scores=None, mass=None, config="10pct", **options):
    scores = torch.zeros(B, N) if scores is None else scores
    return vp.select(
        scores, torch.zeros(B) if mass is None else mass, make_visual(), config, **options
    )


def freed(tensor, size=0):
    """The tensor, its memory given back under it."""
    tensor.untyped_storage().resize_(size)
    return tensor


def freed_cache(name, size=0, **changes):
    kv = make_kv(**changes)
    freed(getattr(kv, name), size)
    return kv


class Wide:
    """A policy that breaks its word in one way or another."""

    def __init__(self, bound=5, counts=None):
        self._bound, self._counts = bound, counts

    def bound(self, n_visual):
        return self._bound

    def counts(self, mass, n_visual, scores):
        return self._counts


# name: (call, kind of error, words of the message: what was expected or came, and the way out)
TABLE = {
    # the config of a call
    "preset unknown": (lambda: decode(config="1pct"), ValueError, ["'1pct'", "'10pct', '5pct'"]),
    "config no config": (lambda: decode(config=0.1), TypeError, ["PulseConfig", "float"]),
    # the cache
    "k rank": (
        lambda: make_kv(k=torch.zeros(G, N, D)),
        ValueError,
        ["[B, G, N, D]", "(2, 40, 16)"],
    ),
    "no set": (lambda: vp.score(make_q(), make_kv(), None), TypeError, ["a VisualTokens", "None"]),
    "k no tensor": (lambda: make_kv(k=[1]), TypeError, ["k must be a tensor", "list"]),
    "k integer": (
        lambda: make_kv(k=torch.zeros(B, G, N, D, dtype=torch.int8)),
        TypeError,
        ["int8", "dequantise"],
    ),
    "v dtype": (lambda: make_kv(v=torch.zeros(B, G, N, D).half()), TypeError, ["share a dtype"]),
    "v shape": (lambda: make_kv(v=torch.zeros(B, G, N, 8)), ValueError, ["share a shape", "8"]),
    "v device": (lambda: make_kv(v=torch.zeros(B, G, N, D, device="meta")), ValueError, ["meta"]),
    "k empty": (
        lambda: make_kv(k=torch.zeros(B, G, 0, D), v=torch.zeros(B, G, 0, D)),
        ValueError,
        ["must not be empty", "0"],
    ),
    "head dim": (
        lambda: make_kv(k=torch.zeros(B, G, N, 257), v=torch.zeros(B, G, N, 257)),
        ValueError,
        ["at most 256", "257"],
    ),
    "k stride": (
        lambda: make_kv(k=torch.zeros(B, G, D, N).transpose(2, 3)),
        ValueError,
        ["stride 1", "contiguous()"],
    ),
    "k repeated": (
        lambda: make_kv(k=torch.zeros(B, 1, N, D).expand(B, 8, N, D), v=torch.zeros(B, 8, N, D)),
        ValueError,
        ["repeats one head 8 times", "before they are repeated"],
    ),
    "lengths dtype": (
        lambda: make_kv(lengths=torch.tensor([1, 2])),
        TypeError,
        ["int32", "int64", "to(torch.int32)"],
    ),
    "lengths count": (lambda: make_kv(lengths=i32(1)), ValueError, ["per row", "1 for B=2"]),
    "lengths rank": (lambda: make_kv(lengths=i32(1, 2)[None]), ValueError, ["int32 [B]", "(1, 2)"]),
    "lengths device": (
        lambda: make_kv(lengths=i32(1, 2).to("meta")),
        ValueError,
        ["lengths", "meta", ".to('cpu')"],
    ),
    "lengths beyond": (
        lambda: decode(kv=make_kv(lengths=i32(40, 41))),
        ValueError,
        ["lengths", "0..40", "41"],
    ),
    "lengths negative": (lambda: decode(kv=make_kv(lengths=i32(-1, 4))), ValueError, ["-1..4"]),
    "starts beyond": (lambda: decode(kv=make_kv(starts=i32(0, 99))), ValueError, ["starts", "99"]),
    "starts dtype": (lambda: make_kv(starts=torch.zeros(2)), TypeError, ["starts", "float32"]),
    "validate": (lambda: make_kv(lengths=i32(40, 41)).validate(), ValueError, ["0..40", "41"]),
    "cache no cache": (
        lambda: decode(kv=(torch.zeros(1), torch.zeros(1))),
        TypeError,
        ["KVCache", "tuple", "KVCache(k, v)"],
    ),
    "layout": (lambda: make_paged(layout="DHN"), ValueError, ["'NHD'", "'HND'", "'DHN'"]),
    "paged rank": (lambda: make_paged(k_pages=torch.zeros(9, D)), ValueError, ["[P, page, G, D]"]),
    "table dtype": (
        lambda: make_paged(block_table=torch.zeros(2, 3).long()),
        TypeError,
        ["block_table", "int32", "int64"],
    ),
    "table rank": (lambda: make_paged(block_table=i32(1, 2)), ValueError, ["int32 [B, pages]"]),
    "paged lengths": (lambda: make_paged(lengths=None), TypeError, ["needs lengths", "NoneType"]),
    "page id beyond": (
        lambda: decode(kv=make_paged(block_table=i32(0, 1, 9, 3, 4, 5).view(2, 3))),
        ValueError,
        ["page ids", "0..8", "9"],
    ),
    "page id missing": (
        lambda: decode(kv=make_paged(block_table=i32(0, 1, -1, 3, 4, 5).view(2, 3))),
        ValueError,
        ["page ids", "-1"],
    ),
    "paged length beyond": (
        lambda: decode(kv=make_paged(lengths=i32(40, 49))),
        ValueError,
        ["lengths", "0..48", "49"],
    ),
    # the query
    "q rank": (
        lambda: decode(q=torch.zeros(B, H, 1, 1, D)),
        ValueError,
        ["[B, H, D]", "[B, Q, H, D]", "(2, 8, 1, 1, 16)"],
    ),
    "q dtype": (lambda: decode(q=make_q(dtype=torch.bfloat16)), TypeError, ["share", "bfloat16"]),
    "q rows": (lambda: decode(q=make_q(rows=3)), ValueError, ["q has 3 rows", "2"]),
    "q dim": (lambda: decode(q=make_q(dim=8)), ValueError, ["head dim 8", "16"]),
    "q heads": (
        lambda: decode(q=make_q(heads=7)),
        ValueError,
        ["multiple of KV heads", "H=7 and G=2", "before they are repeated"],
    ),
    "q group": (lambda: decode(q=make_q(heads=66)), ValueError, ["at most 32", "33"]),
    "q stride": (
        lambda: decode(q=torch.zeros(B, D, H).transpose(1, 2)),
        ValueError,
        ["q must have stride 1", "contiguous()"],
    ),
    "q device": (lambda: decode(q=make_q().to("meta")), ValueError, ["q is on meta", "cpu"]),
    "gradient": (
        lambda: decode(q=make_q().requires_grad_()),
        ValueError,
        ["gradient", "torch.no_grad()"],
    ),
    # memory that was freed under a tensor: a kernel reads by address
    "q freed": (
        lambda: decode(q=freed(make_q())),
        ValueError,
        ["storage of q", "0 bytes", "freed"],
    ),
    "k freed": (lambda: decode(kv=freed_cache("k")), ValueError, ["storage of k", "freed"]),
    "v cut": (lambda: decode(kv=freed_cache("v", 4096)), ValueError, ["of v holds 4096", "10240"]),
    "lengths freed": (
        lambda: decode(kv=freed_cache("lengths", lengths=i32(40, 33))),
        ValueError,
        ["storage of lengths", "freed"],
    ),
    "out freed": (lambda: decode(out=freed(make_q())), ValueError, ["storage of out", "freed"]),
    "indices freed": (lambda: follow(freed(i32(3, 4).view(2, 1))), ValueError, ["indices"]),
    "scores freed": (lambda: select(scores=freed(torch.zeros(B, N))), ValueError, ["of scores"]),
    # the visual set
    "mask rank": (
        lambda: vp.VisualTokens.from_mask(torch.ones(4).bool()),
        ValueError,
        ["bool [B, N]", "(4,)"],
    ),
    "mask dtype": (
        lambda: vp.VisualTokens.from_mask(torch.ones(1, 4)),
        TypeError,
        ["bool", ".bool()"],
    ),
    "spans overlap": (
        lambda: vp.VisualTokens.from_spans([[(1, 5), (4, 9)]]),
        ValueError,
        ["row 0", "overlap", "position 4"],
    ),
    "span empty": (
        lambda: vp.VisualTokens.from_spans([[(5, 5)]]),
        ValueError,
        ["begin < end", "(5, 5)", "leave empty"],
    ),
    "span negative": (lambda: vp.VisualTokens.from_spans([[(-1, 5)]]), ValueError, ["0 <= begin"]),
    "span no pair": (lambda: vp.VisualTokens.from_spans([[5]]), TypeError, ["pair", "5", "row 0"]),
    "spans none": (lambda: vp.VisualTokens.from_spans([]), ValueError, ["per row", "none"]),
    "span too far": (
        lambda: decode(visual=vp.VisualTokens.from_spans([[(0, 41)], []])),
        ValueError,
        ["covers 41", "40 slots", "cut the mask"],
    ),
    "mask too long": (
        lambda: decode(visual=vp.VisualTokens.from_mask(torch.zeros(2, 41).bool())),
        ValueError,
        ["covers 41", "40 slots"],
    ),
    "capacity too small": (
        lambda: vp.VisualTokens.from_spans([[(0, 9)]], capacity=8),
        ValueError,
        ["9 visual tokens", "capacity is 8", "raise"],
    ),
    "capacity zero": (
        lambda: vp.VisualTokens.from_spans([[(0, 9)]], capacity=0),
        ValueError,
        ["capacity", "at least 1"],
    ),
    "ids of floats": (
        lambda: vp.VisualTokens.from_ids(torch.zeros(1, 3), 5),
        TypeError,
        ["integers", "float32"],
    ),
    "ids none": (
        lambda: vp.VisualTokens.from_ids(torch.zeros(1, 3).long(), []),
        TypeError,
        ["token id", "[]"],
    ),
    "visual rows": (lambda: decode(visual=make_visual(rows=3)), ValueError, ["visual has 3 rows"]),
    "visual a mask": (
        lambda: decode(visual=torch.ones(B, N).bool()),
        TypeError,
        ["VisualTokens", "Tensor", "from_mask"],
    ),
    # options
    "scale text": (lambda: decode(scale="1"), TypeError, ["scale", "number", "str"]),
    "scale nan": (lambda: decode(scale=math.nan), ValueError, ["scale", "finite", "nan"]),
    "softcap zero": (lambda: decode(softcap=0.0), ValueError, ["softcap", "> 0", "None"]),
    "window zero": (lambda: decode(window=0), ValueError, ["window", "at least 1", "0"]),
    "window fraction": (lambda: decode(window=1.5), TypeError, ["window", "number of keys"]),
    "backend unknown": (lambda: decode(backend="tpu"), ValueError, ["'tpu'", "'reference'"]),
    "out shape": (
        lambda: decode(out=torch.zeros(B, H, D + 1)),
        ValueError,
        ["out", "(2, 8, 16)", "(2, 8, 17)"],
    ),
    "out dtype": (lambda: decode(out=make_q(dtype=torch.half)), TypeError, ["out", "float32"]),
    "scores shape": (lambda: decode(scores=torch.zeros(B, 3)), ValueError, ["scores", "(2, 40)"]),
    "scores dtype": (
        lambda: decode(scores=torch.zeros(B, N, dtype=torch.half)),
        TypeError,
        ["scores", "float32"],
    ),
    # a follower
    "no selection": (
        lambda: vp.attend(make_q(), make_kv(), make_visual()),
        ValueError,
        ["visual and selection", "no selection", "neither"],
    ),
    "no visual": (
        lambda: vp.attend(make_q(), make_kv(), None, make_selection()),
        ValueError,
        ["no visual", "neither"],
    ),
    "selection a tensor": (
        lambda: vp.attend(make_q(), make_kv(), make_visual(), i32(1)),
        TypeError,
        ["Selection", "Tensor", "decode"],
    ),
    "selection dtype": (
        lambda: follow(indices=torch.zeros(2, 3).long()),
        TypeError,
        ["indices", "int32", "int64"],
    ),
    "selection rows": (
        lambda: follow(indices=i32(1, 2)[None]),
        ValueError,
        ["[2, K_max", "(1, 2)"],
    ),
    "selection beyond": (
        lambda: follow(indices=i32(3, 4, -1, 5, 6, 40).view(2, 3)),
        ValueError,
        ["indices", "0..39", "40"],
    ),
    "selection unsorted": (
        lambda: follow(indices=i32(4, 3, -1, 5, 6, 7).view(2, 3)),
        ValueError,
        ["ascending", "sort"],
    ),
    "selection counts": (lambda: follow(counts=i32(2, 4)), ValueError, ["counts", "0..3", "4"]),
    # select
    "select rank": (lambda: select(scores=torch.zeros(N)), ValueError, ["float32 [B, N]", "(40,)"]),
    "select dtype": (
        lambda: select(scores=torch.zeros(B, N).half()),
        TypeError,
        ["float32", "float16"],
    ),
    "select mass": (lambda: select(mass=torch.zeros(3)), ValueError, ["mass has 3 rows"]),
    "select without the mean": (
        lambda: select(config=vp.PulseConfig(mass="mean")),
        ValueError,
        ["mass_mean", "score()"],
    ),
    # budgets of a user
    "bound zero": (
        lambda: decode(config=vp.PulseConfig(budget=Wide(bound=0))),
        ValueError,
        ["bound()", "Wide", ">= 1", "0"],
    ),
    "counts dtype": (
        lambda: decode(config=vp.PulseConfig(budget=Wide(counts=torch.zeros(2)))),
        ValueError,
        ["counts()", "Wide", "int32", "float32"],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_gets_one_clear_error(name):
    assert_clear_error(*TABLE[name])


@pytest.mark.parametrize("bad", ["scores shape", "lengths beyond", "window zero"])
def test_an_error_leaves_the_output_alone(bad):
    """The checks all come before the first write."""
    out = torch.full((B, H, D), 7.0)
    options = {
        "scores shape": {"scores": torch.zeros(B, 3)},
        "lengths beyond": {"kv": make_kv(lengths=i32(40, 41))},
        "window zero": {"window": 0},
    }[bad]
    with pytest.raises(ValueError):
        decode(out=out, **options)
    assert (out == 7).all()


def test_an_unavailable_backend_is_refused_with_its_reason(monkeypatch):
    from visionpulse.backends import get

    monkeypatch.setattr(type(get("reference")), "unavailable", lambda self: "no such luck")
    with pytest.raises(vp.BackendUnavailableError, match=r"'reference'.*no such luck.*auto"):
        decode(backend="reference")


def test_the_environment_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("VISIONPULSE_BACKEND", "tpu")
    decode(backend="reference")
    with pytest.raises(ValueError, match="'tpu'"):
        decode()
