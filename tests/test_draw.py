"""The random inputs of the tests are the same numbers on every machine."""

import hashlib

import pytest
import torch

from visionpulse.testing import CASES
from visionpulse.testing.draw import Draws

NAMES = ("grouped", "left-padding", "paged-hnd", "ties", "huge-logits")
HASHES = {
    torch.float32: "c343f7c53a646875",
    torch.bfloat16: "dc5e23bfce874e2b",
    torch.float16: "522d9b348df52ae4",
    torch.float64: "750af9dce451b913",
}
DRAWS = "933350c77b22851f"


def digest(*tensors):
    """Of the bits; NaN, whose bits no standard pins, counts as 0."""
    found = hashlib.sha256()
    for tensor in tensors:
        numbers = torch.where(tensor.isnan(), 0, tensor).contiguous()
        found.update(numbers.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("dtype", HASHES, ids=str)
def test_cases_have_the_same_bits_everywhere(dtype):
    problems = [CASES[name].build(dtype) for name in NAMES]
    tensors = [t for p in problems for t in (p.q, p.kv.k_data, p.kv.v_data)]
    assert digest(*tensors) == HASHES[dtype]


def test_every_kind_of_draw_has_the_same_bits_everywhere():
    draws = Draws(5)
    kinds = draws.normal(7, 9), draws.uniform(70), draws.integers(-3, 90, 70), draws.permutation(70)
    assert digest(*kinds) == DRAWS


def test_another_seed_and_a_further_draw_are_other_numbers():
    draws = Draws(1)
    first = draws.normal(100)
    assert torch.equal(first, Draws(1).normal(100))
    assert not torch.equal(first, draws.normal(100))
    assert not torch.equal(first, Draws(2).normal(100))


def test_draws_are_distributed_as_they_say():
    draws = Draws(0)
    normal, uniform, integers = (
        draws.normal(200, 500), draws.uniform(100_000), draws.integers(-2, 3, 100_000)
    )  # fmt: skip
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.var()) - 1) < 0.02
    assert abs(float((normal[:, 1:] * normal[:, :-1]).mean())) < 0.02, "neighbours depend"
    assert normal.abs().max() > 4 and abs(float((normal.abs() < 1).float().mean()) - 0.683) < 0.01
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(float(uniform.mean()) - 0.5) < 0.01
    shares = (integers + 2).bincount() / len(integers)
    assert len(shares) == 5 and (shares - 0.2).abs().max() < 0.01
    assert draws.permutation(1000).sort().values.tolist() == list(range(1000))
