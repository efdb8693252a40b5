"""Decode steps in tensors that stay where they are, so that a captured graph may read them.

`GraphSteps` writes between replays what changed: the spans of rows whose request is another. All
layers of all steps share one selection. Nothing is read back, and no shape follows from data: a row
that must be dense in a step has count 0, in the same graph.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import budgets
from ..call import filled
from ..layer_ops import LayerOps, paged_cache_of
from ..models.tensor_parallel import HeadGroup
from ..schedule import Role
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import Workspace
from .lookback import KeptSlots, written
from .rows import RequestRow, Spans, SpanTable
from .setting import Setting
from .stats import Counters
from .step import OPTED_OUT, TEXT, UNSCALED, Scales

MAX_RUNS = 1024  # of visual tokens in a request: a picture is one, a video one a frame
RESERVED_PAGE = 16  # tokens; scratch does not depend on it
PREFILL = "prefill"
TOO_MANY_RUNS = f"more than {MAX_RUNS} runs of visual tokens"


@dataclass(frozen=True)
class Buffers:
    """What a step of so many rows reads and writes: views of the first rows."""

    visual: VisualTokens
    selection: Selection
    ratio: Tensor | None  # float32 [rows], of a budget that is drawn
    followed: VisualTokens | None = None  # under lookback: those of rows that follow the last step
    kept: Selection | None = None  # what these kept in it


@dataclass(frozen=True)
class GraphStep:
    """The decode rows of one step, as all its layers see them."""

    rows: int
    queries: int  # tokens of each row: 1, and those drafted
    block_table: Tensor  # int32 [rows, pages]
    lengths: Tensor  # int32 [rows]
    buffers: Buffers


class DeviceSpans:
    """The visual tokens of rows on a device, of which only what changed is written."""

    def __init__(
        self, max_rows: int, max_runs: int, capacity: int, device: torch.device | str
    ) -> None:
        self._host = SpanTable(max_rows, max_runs, fixed=True)
        self.fits = self._host.fits
        with torch.inference_mode(False):
            spans, offsets, counts = (table.to(device, copy=True) for table in self._own())
            self.tables = spans, offsets, counts
            self.visual = VisualTokens.over(spans, offsets, counts, capacity)

    def _own(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._host.spans, self._host.offsets, self._host.counts

    def write(self, spans: Sequence[Spans]) -> None:
        """Bring the rows that changed to the device, without waiting for it."""
        for begin, end in _ranges(self._host.changed(spans)):
            for table, own in zip(self.tables, self._own(), strict=True):
                written(table[begin:end], own[begin:end])


class GraphSteps:
    """The steps of one engine, over memory that is made once."""

    def __init__(
        self,
        setting: Setting,
        max_rows: int,
        capacity: int,
        device: torch.device | str,
        max_runs: int = MAX_RUNS,
        max_queries: int = 1,
    ) -> None:
        """`capacity` is the most visual tokens of a request; it fixes K_max."""
        config = setting.config
        self.setting, self.counters = setting, Counters(device)
        self.max_rows, self.max_queries = max_rows, max_queries
        self.workspace = Workspace()
        self.policy: Any = budgets.policy_of(config.budget, config.ratio)
        self._spans = DeviceSpans(max_rows, max_runs, capacity, device)
        self.kept = self._followed = None
        self._follows: list[bool] = []  # of the rows of this step
        if setting.looks_back:
            self.kept = KeptSlots(config.refresh, max_rows, config.k_max(capacity), device)
            self._followed = DeviceSpans(max_rows, max_runs, capacity, device)
        with torch.inference_mode(False):
            drawn, most = isinstance(self.policy, budgets.Random), max_rows * max_queries
            self._all = Buffers(
                self._spans.visual,
                Selection.empty(most, config.k_max(capacity), device),
                torch.zeros(most, device=device) if drawn else None,
            )
        self._views: dict[tuple[int, int], Buffers] = {}

    def make(
        self,
        rows: Sequence[RequestRow | None],
        count: int,
        block_table: Tensor,
        lengths: Tensor,
        *,
        queries: int = 1,
        counts: bool = True,
    ) -> GraphStep | None:
        """The step of `count` decode rows of `queries` tokens; None where all known stay dense.

        A row that is None, or lies behind the known ones, is dense whatever its request: prefill,
        or the padding of a graph. Without known rows the engine warms up or captures.
        """
        spans: list[Spans] = []
        dense = Counter[str]()
        for row in rows[:count]:
            why = self._why_dense(row)
            spans.append(() if why or row is None else row.spans)
            dense.update([why] * queries if why else ())
        if counts and rows:
            self.counters.step(queries * len(spans) - dense.total(), dense)
        spans += [()] * (count - len(spans))
        self._spans.write(spans)
        if self.kept is not None and self._followed is not None:
            self._follow(self.kept, self._followed, rows, spans, counts)
        if rows and not any(spans):
            return None  # a graph, where there is one, reads the empty rows
        if self._all.ratio is not None:
            drawn = self.policy.draw(count * queries, self._all.ratio.device)
            self._all.ratio[: count * queries].copy_(drawn)
        table, buffers = block_table[:count], self._buffers(count, queries)
        return GraphStep(count, queries, table, lengths[:count], buffers)

    def _why_dense(self, row: RequestRow | None) -> str:
        if row is None:
            return PREFILL
        if row.wish not in (None, True):  # the front process refuses all but opting out
            return OPTED_OUT
        if not row.spans:
            return TEXT
        return "" if self._spans.fits(row.spans) else TOO_MANY_RUNS

    def _follow(
        self,
        kept: KeptSlots,
        followed: "DeviceSpans",
        rows: Sequence[RequestRow | None],
        spans: Sequence[Spans],
        begins: bool,
    ) -> None:
        """Say which rows follow their last step; of the builders of a step, one begins it."""
        if begins:
            names = [
                row.request if row and own else None for row, own in zip(rows, spans, strict=False)
            ]
            self._follows = kept.step(names, len(spans))
        follows = [*self._follows, *[False] * len(spans)]  # none, before a step has begun
        followed.write([own if f else () for own, f in zip(spans, follows, strict=False)])

    def _buffers(self, rows: int, queries: int) -> Buffers:
        made = self._views.get((rows, queries))
        if made is None:
            ratio = self._all.ratio
            made = self._views[rows, queries] = Buffers(
                self._all.visual.first(rows),
                self._all.selection.first(rows * queries),
                None if ratio is None else ratio[: rows * queries],
                None if self._followed is None else self._followed.visual.first(rows),
                None if self.kept is None else self.kept.first(rows),
            )
        return made


class GraphLayer:
    """One attention layer that is an anchor or follows one."""

    def __init__(
        self,
        steps: GraphSteps,
        role: Role,
        scale: float,
        softcap: float | None = None,
        heads: HeadGroup | None = None,
        layer: int = 0,
    ) -> None:
        self.steps, self.role, self.heads = steps, role, heads
        roles, kept = steps.setting.roles, steps.kept
        is_early = role is Role.FOLLOWER and layer < steps.setting.anchors[0]
        self.kept = kept if is_early else None  # what a layer before the anchor follows
        self.reads = is_early and Role.FOLLOWER not in roles[:layer]
        self.numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}
        self._ops: dict[int, LayerOps] = {}  # by tokens of a row

    def run(
        self,
        step: GraphStep,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        out: Tensor,
        scales: Scales = UNSCALED,
    ) -> None:
        """Attend to the decode rows: q and out [rows * queries, H, D], pages [P, G, page, D]."""
        if step.queries > 1:
            q, out = (t.view(step.rows, step.queries, *t.shape[1:]) for t in (q, out))
        kv = paged_cache_of(k_pages, v_pages, step.block_table, step.lengths, "HND", *scales)
        visual, selection = step.buffers.visual, step.buffers.selection
        steps, config = self.steps, self.steps.setting.config
        ops = self._ops.get(step.queries)
        if ops is None:  # made by a step that warms up, before any capture
            ops = self._ops[step.queries] = LayerOps(q, kv, None, config, **self.numbers)
        if self.kept is not None:
            followed, kept = step.buffers.followed, step.buffers.kept
            assert kept is not None
            if self.reads:
                self.kept.read(kept)
            ops.attend(q, kv, followed, kept, steps.workspace, out)
            return
        if self.role is Role.FOLLOWER:
            ops.attend(q, kv, visual, selection, steps.workspace, out)
            return
        if self.heads is not None and self.heads.splits(q):
            made, chosen = self.heads.decode(q, kv, visual, config, **self.numbers)
            out.copy_(made)
            filled(selection, chosen)
        else:
            ratio = step.buffers.ratio
            ops.decode(q, kv, visual, steps.workspace, out, selection, ratio)
        if steps.kept is not None:
            steps.kept.write(selection)
        steps.counters.selected(selection, visual)

    def reserve(self, q: Tensor, kv_heads: int, dtype: torch.dtype, longest: int) -> None:
        """Run the largest step once, so that an engine which measures its memory sees the scratch.

        `q` [any, H, D] says what queries are like; all rows read one page, over and over.
        """
        steps, (heads, dim) = self.steps, q.shape[1:]
        pages = torch.zeros(1, kv_heads, RESERVED_PAGE, dim, dtype=dtype, device=q.device)
        table = torch.zeros(
            steps.max_rows, -(-longest // RESERVED_PAGE), dtype=torch.int32, device=q.device
        )
        lengths = torch.full((steps.max_rows,), longest, dtype=torch.int32, device=q.device)
        full = [RequestRow("", ((0, longest - 1),))] * steps.max_rows
        for queries, rows in product({1, steps.max_queries}, (full, [])):
            step = steps.make(rows, steps.max_rows, table, lengths, queries=queries, counts=False)
            assert step is not None  # no known row is dense
            own = q.new_zeros(steps.max_rows * queries, heads, dim)
            self.run(step, own, pages, pages, torch.empty_like(own))
        steps.counters.forget()


def leading(tokens: Sequence[int], most: int) -> tuple[int, int]:
    """Of rows with so many tokens: how many at the front have the same, up to `most`; and how many.

    Rows of no token behind them are the padding of a graph, which has one shape.
    """
    if not tokens or not 0 < tokens[0] <= most:
        return 0, 1
    count = next((i for i, own in enumerate(tokens) if own != tokens[0]), len(tokens))
    return (count if any(tokens[count:]) else len(tokens)), tokens[0]


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges [begin, end)."""
    made: list[tuple[int, int]] = []
    for number in numbers:
        if made and made[-1][1] == number:
            made[-1] = (made[-1][0], number + 1)
        else:
            made.append((number, number + 1))
    return made
