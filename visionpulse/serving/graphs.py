"""Decode steps in tensors that stay where they are, so that a captured graph may read them.

`GraphSteps` writes between replays what changed: the spans of rows whose request is another. All
layers of all steps share one selection. Nothing is read back, and no shape follows from data: a row
that must be dense in a step has count 0, in the same graph.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from .rows import RequestRow, Spans, SpanTable
from .setting import Setting
from .stats import Counters
from .step import OPTED_OUT, TEXT

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


@dataclass(frozen=True)
class GraphStep:
    """The decode rows of one step, as all its layers see them."""

    rows: int
    queries: int  # tokens of each row: 1, and those drafted
    block_table: Tensor  # int32 [rows, pages]
    lengths: Tensor  # int32 [rows]
    buffers: Buffers


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
        self._host = SpanTable(max_rows, max_runs, fixed=True)
        with torch.inference_mode(False):
            host = self._host
            spans, offsets = host.spans.to(device, copy=True), host.offsets.to(device, copy=True)
            counts = host.counts.to(device, copy=True)
            self._tables = (spans, offsets, counts)
            drawn, most = isinstance(self.policy, budgets.Random), max_rows * max_queries
            self._all = Buffers(
                VisualTokens.over(spans, offsets, counts, capacity),
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
        self._write([*spans, *[()] * (count - len(spans))])
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
        return "" if self._host.fits(row.spans) else TOO_MANY_RUNS

    def _write(self, spans: Sequence[tuple[tuple[int, int], ...]]) -> None:
        """Bring the rows that changed to the device, without waiting for it."""
        here = (self._host.spans, self._host.offsets, self._host.counts)
        for begin, end in _ranges(self._host.changed(spans)):
            for table, own in zip(self._tables, here, strict=True):
                part = own[begin:end]
                if table.device.type == "cuda":
                    part = part.pin_memory()  # a copy: the next step may write the table at once
                table[begin:end].copy_(part, non_blocking=True)

    def _buffers(self, rows: int, queries: int) -> Buffers:
        made = self._views.get((rows, queries))
        if made is None:
            ratio = self._all.ratio
            made = self._views[rows, queries] = Buffers(
                self._all.visual.first(rows),
                self._all.selection.first(rows * queries),
                None if ratio is None else ratio[: rows * queries],
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
    ) -> None:
        self.steps, self.role, self.heads = steps, role, heads
        self.numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}
        self._ops: dict[int, LayerOps] = {}  # by tokens of a row

    def run(
        self, step: GraphStep, q: Tensor, k_pages: Tensor, v_pages: Tensor, out: Tensor
    ) -> None:
        """Attend to the decode rows: q and out [rows * queries, H, D], pages [P, G, page, D]."""
        if step.queries > 1:
            q, out = (t.view(step.rows, step.queries, *t.shape[1:]) for t in (q, out))
        kv = paged_cache_of(k_pages, v_pages, step.block_table, step.lengths, "HND")
        visual, selection = step.buffers.visual, step.buffers.selection
        steps, config = self.steps, self.steps.setting.config
        ops = self._ops.get(step.queries)
        if ops is None:  # made by a step that warms up, before any capture
            ops = self._ops[step.queries] = LayerOps(q, kv, None, config, **self.numbers)
        if self.role is Role.FOLLOWER:
            ops.attend(q, kv, visual, selection, steps.workspace, out)
            return
        if self.heads is not None and self.heads.splits(q):
            made, kept = self.heads.decode(q, kv, visual, config, **self.numbers)
            out.copy_(made)
            filled(selection, kept)
        else:
            ratio = step.buffers.ratio
            ops.decode(q, kv, visual, steps.workspace, out, selection, ratio)
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
        for queries, rows in itertools.product({1, steps.max_queries}, (full, [])):
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
