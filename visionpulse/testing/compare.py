"""How close is close: one table, and properties where the contract is exact."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..budgets import clamp_count
from ..cache import Cache, KVCache, PagedKVCache
from ..call import Params
from ..float8 import FLOAT8
from ..selection import Selection
from ..visual import VisualTokens
from .cases import Problem

_EPS = torch.finfo(torch.float32).eps


class Tolerance(NamedTuple):
    """The bounds of the contract's section on numerics."""

    times_torch: float = 2  # of the error that torch's own attention makes in the same dtype
    roundings: float = 4  # of the output: `eps` per unit of sum p |v|, whatever the logits are
    roundings_per_logit: float = 2  # and as many again per unit of max |z|
    ulps: float = 2  # of the output dtype, at the largest value of the reference
    relative: float = 1e-4  # of the mass
    per_logit: float = 16  # of the mass, in float32 epsilons per unit of max |z| / tau
    eps: float = _EPS  # of the arithmetic


# Every dtype accumulates in float32, so the bounds differ only through the dtype's own ulp.
TOLERANCES = {
    torch.float32: Tolerance(),
    torch.bfloat16: Tolerance(),
    torch.float16: Tolerance(),
    torch.float64: Tolerance(relative=1e-12, per_logit=0, eps=torch.finfo(torch.float64).eps),
}
# A share of the softmax below float32's normal range may vanish, once per key.
_TINY = torch.finfo(torch.float32).tiny
# Called with what was compared, its dtype, and the largest error over its bound.
Watch = Callable[[str, torch.dtype, float], object]
watches: list[Watch] = []


def _double(kv: Cache) -> Cache:
    k, v = reference.dequantised(kv, torch.float64)
    if isinstance(kv, PagedKVCache):
        return PagedKVCache(k, v, kv.block_table, kv.lengths, kv.starts, kv.layout)
    return KVCache(k, v, kv.lengths, kv.starts)


class Exact:
    """The contract in float64 on the very inputs a backend was given."""

    def __init__(self, q: Tensor, kv: Cache, visual: VisualTokens, params: Params) -> None:
        self.params, self.dtype, self.q, self.kv = params, q.dtype, q, kv
        wide = _double(kv)
        self.k, self.v = reference.keys_and_values(wide, q.shape[1])  # [B, H, N, D]
        self.visible = reference.visible_in(wide, params)  # [B, N]
        self.candidate = self.visible & visual.mask(kv.capacity)
        self.z = reference.logits(q.double(), self.k, self.visible, params)
        self.scores, self.mass, self.mass_mean = reference.score_of(self.z, self.candidate, params)
        self.visual = visual

    @classmethod
    def of(cls, problem: Problem, params: Params | None = None) -> "Exact":
        """The same of a problem, by default at the numbers of a plain call."""
        q, kv, visual = problem.q, problem.kv, problem.visual
        return cls(q, kv, visual, params or Params(q.shape[2] ** -0.5))

    @property
    def n_visual(self) -> Tensor:
        """N_v of each row."""
        return self.candidate.sum(1, dtype=torch.int32)

    def output(self, attended: Tensor) -> Tensor:
        """Attention over the given keys, float64 [B, H, D]."""
        return reference.weigh(self.z, self.v, attended, torch.float64)

    def torch_output(self, attended: Tensor) -> Tensor:
        """What torch makes of the same keys in the backend's dtype, row by row.

        K and V of 8 bits times their scale fit no 16-bit dtype: torch has them in float32.
        """
        rows, dtype = [], torch.float32 if self.kv.dtype == FLOAT8 else self.dtype
        for b, keys in enumerate(attended):
            q = self.q[b, :, None].to(dtype)  # [H, 1, D]
            k, v = (t[b][:, keys].to(dtype) for t in (self.k, self.v))
            if not keys.any():
                rows.append(torch.zeros_like(q[:, 0]))
            elif self.params.softcap:
                z = self.params.scale * (q.float() @ k.float().transpose(1, 2))
                z = self.params.softcap * torch.tanh(z / self.params.softcap)
                rows.append((z.softmax(-1) @ v.float())[:, 0].to(dtype))
            else:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    out = torch.nn.functional.scaled_dot_product_attention(
                        q[None], k[None], v[None], scale=self.params.scale
                    )
                rows.append(out[0, :, 0])
        return torch.stack(rows).to(self.dtype)

    def attended(self, selection: Selection | None) -> Tensor:
        """Text and selected keys, or all visible ones: bool [B, N]."""
        if selection is None:
            return self.visible
        return reference.attended_keys(self.visible, self.visual, selection)

    @property
    def largest_logit(self) -> Tensor:
        """Max |z| of each row."""
        return self.z.nan_to_num(0.0, 0.0, 0.0).abs().amax((1, 2))

    def slack(self, tau: float) -> Tensor:
        """The relative error that a share of the softmax at `tau` may have, per row."""
        tolerance = TOLERANCES[self.dtype]
        return tolerance.relative + tolerance.per_logit * _EPS * self.largest_logit / tau

    def rounding(self, attended: Tensor, rounds_weights: bool) -> float:
        """The error of the output that roundings alone explain, whatever CPU torch runs on.

        A logit is off by roundings that grow with it, its weight by as much relative to itself,
        and a weight rounded to the dtype by half an epsilon more.
        """
        tolerance = TOLERANCES[self.dtype]
        z = self.z.masked_fill(~attended[:, None], 0.0).nan_to_num(0.0, 0.0, 0.0)
        size = reference.weigh(self.z, self.v.abs(), attended, torch.float64).nan_to_num(0.0)
        per_unit = tolerance.eps * (
            tolerance.roundings + tolerance.roundings_per_logit * float(z.abs().max())
        )
        if rounds_weights:
            per_unit += torch.finfo(self.dtype).eps / 2
        return float(size.max()) * per_unit


def assert_clear_error(
    call: Callable[[], object], kind: type[Exception], words: Sequence[str]
) -> None:
    """A call fails with this kind of error, and its message says each of the words."""
    try:
        call()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def _assert_same_nan(got: Tensor, wanted: Tensor, what: str) -> None:
    where = got.isnan() != wanted.isnan()
    assert not where.any(), f"{what}: NaN in other places, {int(where.sum())} of {where.numel()}"


class OutputError(NamedTuple):
    """The largest error of an output over a call, and what it is measured against."""

    error: float
    bound: float
    torch: float  # the error of torch's own attention

    @property
    def ratio(self) -> float:
        """The error over its bound: above 1 is wrong."""
        return self.error / self.bound if self.bound else float(self.error > 0)


def output_error(
    out: Tensor, exact: Exact, selection: Selection | None, *, rounds_weights: bool = False
) -> OutputError:
    """Compare an output with the contract; `rounds_weights` is what its backend declares."""
    attended = exact.attended(selection)
    wanted = exact.output(attended)
    finite = ~wanted.isnan()
    if not finite.any():
        return OutputError(0.0, 0.0, 0.0)
    tolerance = TOLERANCES[out.dtype]
    torchs = float((exact.torch_output(attended).double() - wanted)[finite].abs().max())
    largest = wanted[finite].abs().max()
    ulp = torch.finfo(out.dtype).eps * 2.0 ** torch.floor(torch.log2(largest.clamp(min=_TINY)))
    error = float((out.double() - wanted)[finite].abs().max())
    bound = max(tolerance.times_torch * torchs, exact.rounding(attended, rounds_weights))
    return OutputError(error, bound + tolerance.ulps * float(ulp), torchs)


def assert_output(
    out: Tensor, exact: Exact, selection: Selection | None, *, rounds_weights: bool = False
) -> None:
    """An output is right when roundings, or torch in the same dtype, explain its largest error."""
    _assert_same_nan(out.double(), exact.output(exact.attended(selection)), "output")
    found = output_error(out, exact, selection, rounds_weights=rounds_weights)
    _watch("output", out.dtype, found.ratio)
    assert found.ratio <= 1, (
        f"output: error {found.error:.3e} above {found.bound:.3e} by {found.ratio:.2f}x "
        f"(torch {found.torch:.3e})"
    )


def _watch(what: str, dtype: torch.dtype, ratio: float) -> None:
    for watch in watches:
        watch(what, dtype, ratio)


def _assert_within(got: Tensor, wanted: Tensor, slack: Tensor, what: str, exact: Exact) -> None:
    _assert_same_nan(got, wanted, what)
    error = (got - wanted).abs()
    _watch(what, exact.dtype, float((error / slack).nan_to_num(0.0).max()))
    bad = error > slack
    assert not bad.any(), (
        f"{what}: off by {error[bad].max():.3e} in {int(bad.sum())} of {bad.numel()} places"
    )


def assert_masses(mass: Tensor, mass_mean: Tensor, exact: Exact) -> None:
    """Both masses within the contract's relative bound."""
    tiny = _TINY * exact.visible.shape[1]
    for got, wanted, what in (
        (mass, exact.mass, "mass"),
        (mass_mean, exact.mass_mean, "mass_mean"),
    ):
        _assert_within(
            got.double(), wanted, exact.slack(exact.params.tau) * wanted.abs() + tiny, what, exact
        )


def assert_scores(scores: Tensor, exact: Exact) -> None:
    """Scores of the candidates near the exact ones, -inf everywhere else."""
    assert (scores[~exact.candidate] == -torch.inf).all(), "a score outside the candidates"
    got, wanted = (torch.where(exact.candidate, t.double(), 0.0) for t in (scores, exact.scores))
    slack = exact.slack(min(exact.params.tau, 1.0))[:, None]  # [B, 1]
    if exact.params.score == "logit":
        # a mean of logits may cancel: its error scales with the terms, not with the sum
        slack = (slack * exact.largest_logit[:, None]).expand_as(got)
    else:
        slack = slack * wanted.abs() + _TINY * got.shape[1]
    _assert_within(got, wanted, slack, "scores", exact)


def assert_counts(selection: Selection, n_visual: Tensor, params: Params) -> None:
    """K is bit-exact, given the mass that the backend itself reports."""
    if params.wanted is not None:
        wanted = params.wanted.clamp(min=0).minimum(n_visual)
    else:
        mass = selection.mass if params.mass_of == "max" else selection.mass_mean
        ratio = mass if params.ratio is None else params.ratio
        wanted = clamp_count(ratio, n_visual, params.r_min, params.r_max)
    assert torch.equal(selection.counts, wanted), (
        f"counts {selection.counts.tolist()}, the mass asks for {wanted.tolist()}"
    )


def assert_valid_selection(selection: Selection, scores: Tensor, candidate: Tensor) -> None:
    """Hold for every right selection of these scores [B, N], and for no wrong one."""
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    rows = zip(selection.indices, selection.counts.tolist(), scores, candidate, strict=True)
    for row, count, score, allowed in rows:
        assert 0 <= count <= len(row), f"count {count} outside 0..{len(row)}"
        kept = row[:count].long()
        assert (row[count:] == -1).all(), "padding must be -1"
        assert (kept.diff() > 0).all(), "indices must be ascending and unique"
        assert ((kept >= 0) & (kept < len(score))).all(), "indices must be positions"
        assert allowed[kept].all(), "only visible visual tokens may be selected"
        dropped = allowed.clone().index_fill_(0, kept, False).nonzero().flatten()
        if not len(kept) or not len(dropped):
            continue
        # NaN ranks last: (is a number, score) in lexicographic order
        number = ~score.isnan()
        assert number[kept].all() or not number[dropped].any(), "a NaN kept before a number"
        kept_worst = score[kept].min() if number[kept].all() else torch.nan
        if number[kept].all():
            best = score[dropped][number[dropped]]
            assert not len(best) or kept_worst >= best.max(), "a kept score below a dropped one"
            tied_kept = kept[score[kept] == kept_worst]
            tied_dropped = dropped[score[dropped] == kept_worst]
        else:
            tied_kept, tied_dropped = kept[~number[kept]], dropped[~number[dropped]]
        if len(tied_kept) and len(tied_dropped):
            assert tied_kept.max() < tied_dropped.min(), "ties go to the lowest index"
