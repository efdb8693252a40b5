"""Named problems that every backend must solve: data, few and telling."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Cache, KVCache, PagedKVCache
from ..config import PulseConfig
from ..float8 import FLOAT8, read, stored
from ..visual import VisualTokens
from .draw import Draws

Spans = tuple[tuple[int, int], ...]
_CODES = {"subnormal": 8, "finite": 127}  # of float8_e4m3fn: the lowest magnitudes, all numbers


class Scales(NamedTuple):
    """Scales of a cache of float8_e4m3fn: none, one number, or one for each KV head."""

    k: tuple[float, ...] = ()
    v: tuple[float, ...] = ()


class Half:
    """A policy of a user's own, which runs between score and select."""

    def bound(self, n_visual: int) -> int:
        """The most that a row keeps."""
        return max(1, n_visual // 2)

    def counts(self, mass: Tensor, n_visual: Tensor, scores: Tensor) -> Tensor:
        """K of each row."""
        return n_visual // 2


@dataclass(frozen=True)
class Case:
    """One problem in words; `build` makes its tensors."""

    name: str
    visual: tuple[Spans, ...]  # runs of visual tokens, per row
    size: int = 96  # slots of a row, N
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    queries: int | None = None  # Q of q [B, Q, H, D]; None is q [B, H, D]
    q_counts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    # normal, ties, equal, huge, minus_zero, nan_text, nan_visual; with scales also subnormal and
    # finite: what is stored is drawn evenly from the subnormal numbers, or from all
    values: str = "normal"
    scales: Scales | None = None  # of K and V in float8_e4m3fn; None: they have the dtype of q
    layout: str = "plain"  # plain, token_major, unaligned, NHD, HND
    page: int = 16  # slots of a page, in the layouts NHD and HND
    options: dict[str, Any] = field(default_factory=dict)  # scale, softcap, window
    config: PulseConfig = field(default_factory=lambda: PulseConfig(tau=0.4, ratio=(0.05, 0.5)))

    @property
    def rows(self) -> int:
        """B."""
        return len(self.visual)

    def build(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> "Problem":
        """Make the tensors; slots that no step may see hold NaN."""
        draws = Draws(seed)
        axes = () if self.queries is None else (self.queries,)
        q = draws.normal(self.rows, *axes, self.heads, self.head_dim)
        shape = (self.rows, self.kv_heads, self.size, self.head_dim)
        if self.values in _CODES and self.scales is not None:
            k, v = (_drawn(draws, _CODES[self.values], shape, s) for s in self.scales)
        else:
            k, v = draws.normal(*shape), draws.normal(*shape)
        k, v = self._plant(q, k, v)
        hidden = ~self.visible()
        k[hidden[:, None].expand_as(k[..., 0])] = torch.nan
        v[hidden[:, None].expand_as(v[..., 0])] = torch.nan
        q = self._query(q.to(dtype).to(device))
        if self.scales is None:
            kv = self._cache(k.to(dtype).to(device), v.to(dtype).to(device))
        else:
            kv = self._float8_cache(k.to(device), v.to(device), self.scales)
        visual = VisualTokens.from_spans(self.visual, device=device)
        problem = Problem(self, q, kv, visual, self.config)
        if self.q_counts is None:
            return problem
        counts = torch.tensor(self.q_counts, dtype=torch.int32, device=device)
        return problem._replace(q_counts=counts)

    def visible(self) -> Tensor:
        """Which slots some query of a step may see: bool [B, N], straight from the contract."""
        return torch.stack([self.visible_to(i) for i in range(self.queries or 1)]).any(0)

    def visible_to(self, query: int) -> Tensor:
        """Which slots a query may see: bool [B, N]."""
        n = torch.arange(self.size)
        rows = []
        for b, length in enumerate(self.lengths_at(query)):
            start = 0 if self.starts is None else self.starts[b]
            window = self.options.get("window") or self.size
            rows.append((n >= start) & (n < length) & (n > length - 1 - window))
        return torch.stack(rows)

    def lengths_at(self, query: int) -> list[int]:
        """The length of each row as a query has it: 0 for one that is not real."""
        lengths = self.lengths or (self.size,) * self.rows
        queries = self.queries or 1
        real = self.q_counts or (queries,) * self.rows
        return [
            max(0, length - queries + 1 + query) if query >= queries - count else 0
            for length, count in zip(lengths, real, strict=True)
        ]

    def _plant(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.values == "ties":  # three keys in turn: whole classes of equal logits
            k = k[:, :, torch.arange(self.size) % 3]
        elif self.values == "equal":
            k = k[:, :, :1].expand_as(k).clone()
        elif self.values == "huge":
            k = k * 40
        elif self.values == "minus_zero":  # logits are +0.0 or -0.0 and must tie
            signs = torch.where(torch.arange(self.size) % 2 == 0, 0.0, -0.0)
            k = signs[None, None, :, None].expand_as(k).clone()
        elif self.values == "nan_text":
            k[0, 0, 0] = torch.nan
        elif self.values == "nan_visual":
            for b, spans in enumerate(self.visual):
                k[b, 0, spans[0][0] + 1] = torch.nan
        return k, v

    def _query(self, q: Tensor) -> Tensor:
        if self.layout == "plain":
            return q
        if q.dim() == 4:  # [B, H, Q, D] in memory, as transformers has it
            q = q.transpose(1, 2)
        wide = q.new_full((*q.shape[:-1], q.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = q
        view = wide[..., 1:-2]
        return view.transpose(1, 2) if q.dim() == 4 else view

    def _float8_cache(self, k: Tensor, v: Tensor, scales: Scales) -> Cache:
        """The cache of K and V as they are stored, times their scales."""
        k_scale, v_scale = (_tensor(scale, k.device) for scale in scales)
        kv = self._cache(stored(k, k_scale), stored(v, v_scale))
        return dataclasses.replace(kv, k_scale=k_scale, v_scale=v_scale)

    def _cache(self, k: Tensor, v: Tensor) -> Cache:
        device = k.device
        lengths, starts = (
            None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
            for rows in (self.lengths, self.starts)
        )
        if self.layout in ("NHD", "HND"):
            if lengths is None:
                lengths = torch.full((self.rows,), self.size, dtype=torch.int32, device=device)
            return _paged(k, v, lengths, starts, self.layout, self.page)
        place = {"plain": _same, "token_major": _token_major, "unaligned": _unaligned}
        return KVCache(place[self.layout](k), place[self.layout](v), lengths, starts)


class Problem(NamedTuple):
    """The tensors of a case, ready for the ops."""

    case: Case
    q: Tensor
    kv: Cache
    visual: VisualTokens
    config: PulseConfig
    q_counts: Tensor | None = None

    def one_by_one(self) -> "list[tuple[Any, Problem]]":
        """Each query as a problem of its own, and which rows of a selection it has."""
        case, queries = self.case, self.case.queries
        if queries is None:
            return [(torch.arange(case.rows, device=self.q.device), self)]
        parts = []
        for i in range(queries):
            rows = torch.arange(case.rows, device=self.q.device) * queries + i
            lengths = torch.tensor(case.lengths_at(i), dtype=torch.int32, device=self.q.device)
            alone = dataclasses.replace(case, queries=None, q_counts=None)
            kv = dataclasses.replace(self.kv, lengths=lengths)
            parts.append((rows, Problem(alone, self.q[:, i], kv, self.visual, self.config)))
        return parts

    def __repr__(self) -> str:
        return f"Problem({self.case.name}, {self.q.dtype})"


def _tensor(scale: tuple[float, ...], device: torch.device | str) -> Tensor | None:
    return torch.tensor(scale, device=device) if scale else None


def _drawn(
    draws: Draws, magnitudes: int, shape: tuple[int, ...], scale: tuple[float, ...]
) -> Tensor:
    """Numbers [B, G, N, D] that are stored as one of the lowest magnitudes, of either sign."""
    code = draws.integers(0, magnitudes, *shape) + 128 * draws.integers(0, 2, *shape)
    values = code.to(torch.uint8).view(FLOAT8)
    return read(values, _tensor(scale, "cpu"))


def _same(t: Tensor) -> Tensor:
    return t


def _token_major(t: Tensor) -> Tensor:
    """[B, N, G, D] in memory, seen as [B, G, N, D], with NaN between the rows."""
    b, g, n, d = t.shape
    memory = t.new_full((b, n + 1, g, d), torch.nan)
    view = memory[:, :n].transpose(1, 2)
    view.copy_(t)
    return view


def _unaligned(t: Tensor) -> Tensor:
    """Rows that start one element past a boundary, with NaN around each."""
    memory = t.new_full((*t.shape[:3], t.shape[3] + 5), torch.nan)
    memory[..., 1:-4] = t
    return memory[..., 1:-4]


def _paged(
    k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, layout: str, page: int
) -> PagedKVCache:
    """Pages in shuffled order among NaN pages; table entries that no key needs hold -1."""
    b, g, n, d = k.shape
    per_row = -(-n // page)
    order = Draws(1).permutation(2 * b * per_row)
    table = order[: b * per_row].view(b, per_row).to(torch.int32)
    pools = []
    for t in (k, v):
        whole = torch.nn.functional.pad(t, (0, 0, 0, per_row * page - n), value=torch.nan)
        pages = whole.view(b, g, per_row, page, d).transpose(1, 2)  # [B, pages, G, page, D]
        pool = t.new_full((2 * b * per_row, g, page, d), torch.nan)
        pool[table.flatten().long()] = pages.flatten(0, 1)
        pools.append(pool if layout == "HND" else pool.transpose(1, 2).contiguous())
    first = torch.arange(per_row) * page
    unused = first >= lengths.cpu()[:, None]
    if starts is not None:
        unused |= first + page <= starts.cpu()[:, None]
    table = table.masked_fill(unused, -1).to(k.device)
    return PagedKVCache(pools[0], pools[1], table, lengths, starts, layout)


_TWO_IMAGES: Spans = ((4, 30), (37, 80))
_LOGIT = PulseConfig(score="logit", ratio=(0.05, 0.3))
_KEEP_ALL = PulseConfig(ratio=(1.0, 1.0))

CASES = {
    case.name: case
    for case in (
        Case("grouped", (_TWO_IMAGES, ((10, 90),))),
        Case("group1", (_TWO_IMAGES,), heads=3, kv_heads=3, head_dim=32),
        Case("group5", (_TWO_IMAGES,), heads=10, kv_heads=2, head_dim=80),
        Case("group7", (_TWO_IMAGES, ((0, 3),)), heads=14, kv_heads=2, head_dim=128),
        Case("group32", (_TWO_IMAGES,), heads=32, kv_heads=1, head_dim=16),
        Case("d72", (_TWO_IMAGES,), head_dim=72),
        Case("d96", (_TWO_IMAGES,), head_dim=96, heads=6, kv_heads=2),
        Case("d192", (_TWO_IMAGES,), head_dim=192, heads=4),
        Case("d256", (_TWO_IMAGES,), head_dim=256, heads=4),
        Case("ragged", (_TWO_IMAGES, _TWO_IMAGES, _TWO_IMAGES), lengths=(96, 41, 5)),
        Case("left-padding", (_TWO_IMAGES, ((30, 80),)), lengths=(96, 90), starts=(7, 29)),
        Case("no-visual", ((), _TWO_IMAGES)),
        Case("no-visual-at-all", ((), ())),
        Case("all-visual", (((0, 96),),)),
        Case("one-token", (((0, 1),), ()), size=1),
        Case("one-visible", (((40, 41),), ((0, 40),)), lengths=(41, 41), starts=(40, 40)),
        Case("nothing-visible", (_TWO_IMAGES, _TWO_IMAGES), lengths=(0, 20), starts=(0, 20)),
        Case("visual-not-visible", (((60, 90),), ((0, 10),)), lengths=(50, 96), starts=(0, 20)),
        Case("single-tokens", (tuple((i, i + 1) for i in range(1, 90, 2)), ((95, 96),)), heads=4),
        Case("ties", (_TWO_IMAGES, ((3, 96),)), values="ties"),
        Case("ties-logit", (_TWO_IMAGES, ((3, 96),)), values="ties", config=_LOGIT),
        Case("all-equal", (_TWO_IMAGES, ((3, 96),)), values="equal"),
        Case("minus-zero", (_TWO_IMAGES,), values="minus_zero", config=_LOGIT),
        Case("huge-logits", (_TWO_IMAGES, ((10, 90),)), values="huge"),
        Case("nan-text", (_TWO_IMAGES, _TWO_IMAGES), values="nan_text"),
        Case("nan-visual", (_TWO_IMAGES, ((10, 90),)), values="nan_visual", config=_LOGIT),
        Case("keep-all", (_TWO_IMAGES, ((10, 90),)), config=_KEEP_ALL),
        Case("softcap", (_TWO_IMAGES, ((10, 90),)), options={"softcap": 2.0, "scale": 0.5}),
        Case(
            "softcap-logit", (_TWO_IMAGES,), options={"softcap": 2.0, "scale": 0.5}, config=_LOGIT
        ),
        Case("window", (_TWO_IMAGES, ((10, 90),)), lengths=(96, 70), options={"window": 33}),
        Case("token-major", (_TWO_IMAGES, ((10, 90),)), layout="token_major", lengths=(96, 77)),
        Case("unaligned", (_TWO_IMAGES, ((10, 90),)), layout="unaligned", lengths=(96, 77)),
        Case("paged-nhd", (_TWO_IMAGES, ((10, 90),)), layout="NHD", lengths=(96, 50)),
        Case(
            "paged-hnd", (_TWO_IMAGES, ((9, 70),)), layout="HND", lengths=(96, 77), starts=(0, 33)
        ),
        Case("page-of-one", (_TWO_IMAGES,), layout="NHD", page=1, lengths=(90,)),
        Case("odd-page", (_TWO_IMAGES, ((10, 90),)), layout="HND", page=7, lengths=(91, 50)),
        Case("long", (((20, 700), (730, 1400)), ((5, 300),)), size=1500, lengths=(1500, 611)),
    )
}

_TAIL: Spans = ((4, 30), (37, 80), (90, 94))

QUERY_CASES = {
    case.name: case
    for case in (
        Case("two", (_TWO_IMAGES, ((10, 90),)), queries=2),
        Case("most", (_TWO_IMAGES,), queries=16, heads=4),
        Case("group1", (_TWO_IMAGES,), queries=5, heads=3, kv_heads=3, head_dim=32),
        Case("group5", (_TWO_IMAGES,), queries=7, heads=10, head_dim=80),
        # 32 heads of a KV head: two queries fill a pass
        Case("group32", (_TWO_IMAGES,), queries=5, heads=32, kv_heads=1, head_dim=16),
        Case("group8-several-passes", (_TWO_IMAGES,), queries=11, heads=16, head_dim=24),
        Case("d256", (_TWO_IMAGES,), queries=9, heads=8, kv_heads=1, head_dim=256),
        # a picture among the queries themselves, so that each has its own N_v
        Case("picture-at-the-end", (_TAIL, ((60, 96),)), queries=8, lengths=(94, 96)),
        Case("ragged", (_TWO_IMAGES, _TWO_IMAGES, ((0, 3),)), queries=4, lengths=(96, 41, 5)),
        Case(
            "counts", (_TWO_IMAGES,) * 4, queries=6, q_counts=(6, 1, 0, 4), lengths=(96, 41, 90, 60)
        ),
        Case("shorter-than-its-queries", (((0, 2),), ()), queries=6, lengths=(3, 0)),
        Case(
            "left-padding", (_TWO_IMAGES, ((30, 80),)), queries=3, lengths=(96, 90), starts=(7, 88)
        ),
        Case(
            "window",
            (_TWO_IMAGES, ((10, 90),)),
            queries=5,
            lengths=(96, 70),
            options={"window": 33},
        ),
        Case("narrow-window", (_TWO_IMAGES,), queries=6, lengths=(79,), options={"window": 2}),
        Case("softcap", (_TWO_IMAGES,), queries=3, options={"softcap": 2.0, "scale": 0.5}),
        Case("logit", (_TWO_IMAGES, ((3, 96),)), queries=4, values="ties", config=_LOGIT),
        Case("no-visual", ((), _TWO_IMAGES), queries=3),
        Case("keep-all", (_TWO_IMAGES, ((10, 90),)), queries=3, config=_KEEP_ALL),
        Case("nan-visual", (_TWO_IMAGES, ((10, 90),)), queries=3, values="nan_visual"),
        Case(
            "unaligned", (_TWO_IMAGES, ((10, 90),)), queries=4, layout="unaligned", lengths=(96, 77)
        ),
        Case("token-major", (_TWO_IMAGES,) * 2, queries=3, layout="token_major", lengths=(96, 77)),
        Case("paged-nhd", (_TWO_IMAGES, ((10, 90),)), queries=3, layout="NHD", lengths=(96, 50)),
        Case(
            "paged-counts",
            (_TWO_IMAGES, ((9, 70),)),
            queries=4,
            q_counts=(3, 2),
            layout="HND",
            page=7,
            lengths=(91, 77),
            starts=(0, 33),
        ),
        Case(
            "long",
            (((20, 700), (730, 1400)), ((5, 300),)),
            queries=3,
            size=1500,
            lengths=(1500, 611),
        ),
    )
}


def _in_float8(case: Case, number: int) -> Case:
    """The case with scales of one kind or another."""
    heads = case.kv_heads
    kinds = (
        Scales((1 / 64,), (0.02,)),
        Scales(((0.01, 0.5, 0.03) * heads)[:heads], ((2.0, 0.02, 0.1) * heads)[:heads]),
        Scales(((0.05, 0.02) * heads)[:heads], (0.01,)),
        Scales(),
    )
    return dataclasses.replace(case, scales=kinds[-1 if case.values == "huge" else number % 4])


_EXTREMES = (
    Case("finite", (_TWO_IMAGES, ((10, 90),)), values="finite", scales=Scales((1e-2,), (1e-2,))),
    Case("scale-1e-4", (_TWO_IMAGES,), values="finite", scales=Scales((1e-4, 1e-4), (1e-4,))),
    Case("scale-1e4", (_TWO_IMAGES,), values="subnormal", scales=Scales((1e4,), (1e4, 1e4))),
    Case("subnormal", (_TWO_IMAGES,), values="subnormal", scales=Scales((40.0, 90.0), ())),
    Case("clamped", (_TWO_IMAGES,), values="huge", scales=Scales((0.002, 0.02), (0.002,))),
)
# K and V of float8_e4m3fn, beside q in any other dtype
FLOAT8_CASES = {
    case.name: case
    for case in (*(_in_float8(case, i) for i, case in enumerate(CASES.values())), *_EXTREMES)
}
FLOAT8_QUERY_CASES = {
    case.name: case for case in (_in_float8(case, i) for i, case in enumerate(QUERY_CASES.values()))
}
