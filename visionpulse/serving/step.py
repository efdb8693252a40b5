"""One decode step of a serving engine: its decode rows, and what crosses layers in them.

The engine puts the decode rows first. `Steps` makes the `DecodeRows` that all layers of the step
share; a `Layer` runs one attention layer on them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache, PagedKVCache
from ..config import PulseConfig
from ..layer_ops import LayerOps, paged_cache_of
from ..models.tensor_parallel import HeadGroup
from ..schedule import Role
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import default as default_workspace
from .lookback import Kept
from .rows import RequestRow, SpanTable
from .setting import Setting, of_request
from .stats import Counters

TEXT = "no visual tokens"
OPTED_OUT = "opted out"
PREFILL = ""  # the name of a row that is no decode row: dense, and not counted
WISHES = 64  # of requests, worked out and remembered
Scales = tuple[Tensor | None, Tensor | None]  # of K and V in 8 bits
UNSCALED: Scales = (None, None)


@dataclass
class Group:
    """The rows of a step that share a config, where not all do."""

    config: PulseConfig
    index: Tensor  # int64
    visual: VisualTokens


@dataclass
class DecodeRows:
    """The decode rows of one step. Layers run in order, and the selection crosses them in here."""

    rows: int
    queries: int  # tokens of each row: 1, and those drafted
    block_table: Tensor  # int32 [rows, pages]
    lengths: Tensor  # int32 [rows]
    visual: VisualTokens | None  # None where every row is dense
    config: PulseConfig  # of all rows, unless there are groups
    groups: tuple[Group, ...] = ()
    selection: Selection | None = None  # the latest; under lookback first that of the last step
    followed: VisualTokens | None = None  # the visual tokens to read it with
    requests: tuple[str, ...] = ()
    host_lengths: tuple[int, ...] = ()


class Steps:
    """Makes the steps of one engine."""

    def __init__(self, setting: Setting, max_rows: int, counters: Counters) -> None:
        self.setting, self.counters = setting, counters
        self._table = SpanTable(max_rows)
        self._followed = SpanTable(max_rows)
        self._wishes: dict[Any, PulseConfig | None] = {}
        self.kept = Kept(setting.config.refresh) if setting.looks_back else None

    def make(
        self,
        rows: Sequence[RequestRow],
        block_table: Tensor,
        lengths: Tensor,
        host_lengths: Sequence[int] = (),
        queries: int = 1,
    ) -> DecodeRows:
        """The step of decode rows; lookback alone needs their lengths on the host.

        A row of several tokens has the length behind the last one.
        """
        configs = [self._config_of(row.wish) for row in rows]
        spans = [row.spans if c is not None else () for row, c in zip(rows, configs, strict=True)]
        visual = self._table.load(spans)
        step = DecodeRows(len(rows), queries, block_table, lengths, visual, self.setting.config)
        dense = Counter(
            TEXT if config is not None else OPTED_OUT
            for config, own, row in zip(configs, spans, rows, strict=True)
            if not own and row.request != PREFILL
            for _ in range(queries)
        )
        self.counters.step(queries * sum(map(bool, spans)), dense)
        if visual is not None:
            self._group(step, configs, visual)
        if self.kept is not None:
            self._look_back(step, rows, spans, host_lengths)
        return step

    def _config_of(self, wish: Any) -> PulseConfig | None:
        """The config of a request, None where it stays dense."""
        if wish is None:
            return self.setting.config
        if not isinstance(wish, str | bool):
            return None  # the front process refuses it; a worker must live on
        if wish not in self._wishes:
            if len(self._wishes) >= WISHES:
                self._wishes.clear()
            try:
                self._wishes[wish] = of_request(wish, self.setting)
            except ValueError:
                self._wishes[wish] = None
        return self._wishes[wish]

    def _group(
        self, step: DecodeRows, configs: Sequence[PulseConfig | None], visual: VisualTokens
    ) -> None:
        """Rows that ask for a budget of their own are scored and selected by themselves."""
        kinds = [config for config in dict.fromkeys(configs) if config is not None]
        if len(kinds) == 1:
            step.config = kinds[0]
            return
        groups = []
        for kind in kinds:
            index = torch.tensor(
                [i for i, config in enumerate(configs) if config == kind],
                device=step.lengths.device,
            )
            groups.append(Group(kind, index, visual.rows(index)))
        step.groups = tuple(groups)

    def _look_back(
        self,
        step: DecodeRows,
        rows: Sequence[RequestRow],
        spans: Sequence[tuple[tuple[int, int], ...]],
        host_lengths: Sequence[int],
    ) -> None:
        assert self.kept is not None
        step.requests = tuple(row.request for row in rows)
        step.host_lengths = tuple(host_lengths)
        if step.visual is None:
            self.kept.keep(step.requests, step.host_lengths, None)
            return
        follows = self.kept.follows(step.requests, step.host_lengths)
        step.selection = self.kept.selection(step.requests, follows)
        if step.selection is not None:
            followed = [own if f else () for own, f in zip(spans, follows, strict=True)]
            step.followed = self._followed.load(followed)
            if step.followed is None:
                step.selection = None


class Layer:
    """One attention layer: what it does with the decode rows of any step."""

    def __init__(
        self,
        steps: Steps,
        layer: int,
        scale: float,
        softcap: float | None = None,
        window: int | None = None,
        heads: HeadGroup | None = None,
        layout: str = "HND",
    ) -> None:
        self.steps, self.layout, self.heads = steps, layout, heads
        roles = steps.setting.roles  # a draft model has layers beyond them
        self.role = roles[layer] if layer < len(roles) else Role.DENSE
        self.numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}
        self.window = window  # of a layer that is no anchor and follows none
        self._ops: dict[tuple[PulseConfig, int], LayerOps] = {}

    def run(
        self,
        step: DecodeRows,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        out: Tensor,
        scales: Scales = UNSCALED,
    ) -> None:
        """Attend to the decode rows: q and out [rows * queries, H, D]; scales of K and of V."""
        if step.queries > 1:
            q, out = (t.view(step.rows, step.queries, *t.shape[1:]) for t in (q, out))
        kv = paged_cache_of(k_pages, v_pages, step.block_table, step.lengths, self.layout, *scales)
        role = self.role if step.visual is not None else Role.DENSE
        if role is Role.ANCHOR:
            self._keep(step, self._select(step, q, kv, out))
            return
        visual, selection = None, None
        if role is Role.FOLLOWER and step.selection is not None:
            visual, selection = step.followed, step.selection
        workspace = default_workspace(q.device)
        self._ops_of(step.config, q, kv).attend(q, kv, visual, selection, workspace, out)

    def _select(self, step: DecodeRows, q: Tensor, kv: PagedKVCache, out: Tensor) -> Selection:
        if step.groups:
            return self._decode_groups(step, q, kv, out)
        assert step.visual is not None
        return self._decode(q, kv, step.visual, step.config, out)

    def _decode(
        self, q: Tensor, kv: Cache, visual: VisualTokens, config: PulseConfig, out: Tensor
    ) -> Selection:
        """Score, select and attend rows of one config."""
        if self.heads is not None and self.heads.splits(q):
            made, selection = self.heads.decode(q, kv, visual, config, **self.numbers)
            out.copy_(made)
            return selection
        workspace = default_workspace(q.device)
        return self._ops_of(config, q, kv).decode(q, kv, visual, workspace, out)[1]

    def _decode_groups(
        self, step: DecodeRows, q: Tensor, kv: PagedKVCache, out: Tensor
    ) -> Selection:
        """The same for rows of several configs, one config after the other."""
        if step.rows > sum(len(group.index) for group in step.groups):
            workspace = default_workspace(q.device)
            self._ops_of(step.config, q, kv).attend(q, kv, None, None, workspace, out)
        parts = []
        for group in step.groups:
            index = group.index
            table, lengths = step.block_table[index], step.lengths[index]
            pages, scales = (kv.k_pages, kv.v_pages), (kv.k_scale, kv.v_scale)
            own = paged_cache_of(*pages, table, lengths, self.layout, *scales)
            made = torch.empty_like(q[: len(index)])
            parts.append(self._decode(q[index], own, group.visual, group.config, made))
            out[index] = made
        return _joined(step, parts)

    def _keep(self, step: DecodeRows, selection: Selection) -> None:
        """Hand a selection to the followers, to the next step and to the statistics."""
        assert step.visual is not None
        step.selection, step.followed = selection, step.visual
        if self.steps.kept is not None:
            self.steps.kept.keep(step.requests, step.host_lengths, selection)
        self.steps.counters.selected(selection, step.visual)

    def _ops_of(self, config: PulseConfig, q: Tensor, kv: Cache) -> LayerOps:
        key = config, q.shape[-3] if q.dim() == 4 else 1
        made = self._ops.get(key)
        if made is None:
            if len(self._ops) > WISHES:
                self._ops.clear()
            made = self._ops[key] = LayerOps(
                q, kv, None, config, window=self.window, **self.numbers
            )
        return made


def _joined(step: DecodeRows, parts: Sequence[Selection]) -> Selection:
    """The selections of the groups as one, rows without a config empty."""
    width, rows = max(part.indices.shape[1] for part in parts), step.rows * step.queries
    like = parts[0]
    indices = like.indices.new_full((rows, width), -1)
    counts = like.counts.new_zeros(rows)
    mass, mass_mean = like.mass.new_zeros(rows), like.mass.new_zeros(rows)
    for group, part in zip(step.groups, parts, strict=True):
        number = torch.arange(step.queries, device=group.index.device)
        index = (group.index[:, None] * step.queries + number).flatten()
        indices[index, : part.indices.shape[1]] = part.indices
        counts[index], mass[index] = part.counts, part.mass
        mass_mean[index] = part.mass_mean
    return replace(like, indices=indices, counts=counts, mass=mass, mass_mean=mass_mean)
