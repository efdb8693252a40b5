"""The functional ops: check, make a `Call`, hand it to a backend. Tensors in, tensors out."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import budgets, checks, usual
from .backends import Against, Backend, Choice, choice, resolve
from .backends.by_query import fitted
from .cache import Cache
from .call import Call, Params, Scored, score_dtype
from .config import PulseConfig
from .config import resolve as resolve_config
from .queries import count, scored_as_rows
from .selection import Selection
from .tensor_checks import are_readable, is_eager
from .torch_ops import Compiled
from .visual import VisualTokens
from .workspace import Workspace


def decode(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens,
    config: PulseConfig | str = "10pct",
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    q_counts: Tensor | None = None,
    out: Tensor | None = None,
    scores: Tensor | None = None,
    selection: Selection | None = None,
    workspace: Workspace | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Selection]:
    """Choose the visual tokens of this step and attend to text and to them.

    Defined, for one row with visible keys, visual ones V among them, and every query head h, by

        z = scale * q @ k.T                                       # [H, N]
        M = (z / tau).softmax(-1)[:, V].sum(-1).max()             # visual attention mass
        K = floor(clamp(M, r_min, r_max) * len(V))                # at least 1
        S = z.softmax(-1).mean(0)[V]
        kept = V[S.topk(K).indices]                               # ties: the lowest position
        out = softmax(z[:, text + kept]) @ v[text + kept]

    `scores`, [B, N], is filled with the S that was ranked, -inf where there is no candidate;
    `selection`, buffers as `Selection.empty` makes them, with what is returned.

    `q` [B, Q, H, D] holds the last Q tokens of each row, 1 to 16: query i has its own key at
    `length - Q + i`, sees none behind it, and is a step of its own. The selection then has B * Q
    rows in the order (b, i), `out` is shaped as `q`, `scores` is [B, Q, N]. Of a row with fewer
    tokens the last `q_counts` queries, int32 [B], are real; the others give zeros.
    """
    config = resolve_config(config)
    check(q, kv, visual, needs_visual=True)
    if out is not None:
        checks.buffer("out", out, tuple(q.shape), q)
    if q_counts is not None:
        checks.query_counts(q_counts, q)
    if scores is not None:
        checks.scores_buffer(scores, kv.capacity, q)
    params = numbers(q, scale, softcap, window)
    rows = q.shape[:-2].numel()
    selected = _buffers(selection, config, visual, rows, score_dtype(q))
    params, policy = budget(params, config, visual, rows, q.device)
    if scores is not None:
        scores = scores.view(-1, kv.capacity)
    call = Call(
        q, kv, params, visual, out=out, scores=scores, workspace=workspace, q_counts=q_counts,
        selected=selected,
    )  # fmt: skip
    runner = _backend_of(call, backend or config.backend)
    if policy is None:
        return runner.decode(call)
    return runner.staged(call, lambda scored: _asked(policy, scored))


def score(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens,
    config: PulseConfig | str = "10pct",
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    q_counts: Tensor | None = None,
    workspace: Workspace | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank the visual tokens: scores [B, N], largest and mean mass of the heads [B].

    Defined by the lines of `decode` that give S and M; -inf where there is no candidate. For `q`
    [B, Q, H, D] they are [B, Q, N] and [B, Q].
    """
    config = resolve_config(config)
    check(q, kv, visual, needs_visual=True)
    if q_counts is not None:
        checks.query_counts(q_counts, q)
    params = numbers(q, scale, softcap, window)
    params = params._replace(tau=config.tau, mass_of=config.mass, score=config.score)
    call = Call(q, kv, params, visual, workspace=workspace, q_counts=q_counts)
    scored, _ = _backend_of(call, backend or config.backend).score(call)
    by = q.shape[:-2]  # B, or B and Q
    return scored.scores.view(*by, -1), scored.mass.view(by), scored.mass_mean.view(by)


def select(
    scores: Tensor,
    mass: Tensor,
    visual: VisualTokens,
    config: PulseConfig | str = "10pct",
    *,
    mass_mean: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    q_counts: Tensor | None = None,
    selection: Selection | None = None,
    workspace: Workspace | None = None,
    backend: str | None = None,
) -> Selection:
    """Keep the K best visual tokens of each row, K from the mass.

    Defined, for one row with candidates V, by

        K = floor(clamp(mass, r_min, r_max) * len(V))             # at least 1
        kept = V[scores[V].topk(K).indices].sort().values         # ties: the lowest position

    `mass_mean` is needed where the config asks for mass="mean"; `starts`, `lengths` and `window`
    cut the candidates as they cut the keys, and so does `q_counts` for scores [B, Q, N], whose
    selection has B * Q rows. `selection` is filled as by `decode`.
    """
    config = resolve_config(config)
    if not usual.ranked(scores, mass, mass_mean, visual):
        checks.ranked(scores, mass, mass_mean)
        checks.visual_set(visual, scores.shape[0], scores.shape[-1], scores.device)
        checks.visual_tables(visual)
    device = scores.device
    selected = _buffers(selection, config, visual, mass.numel(), mass.dtype)
    for name, cut in (("starts", starts), ("lengths", lengths)):
        if cut is not None:
            checks.row_cut(name, cut, scores)
    queries = scores.shape[1] if scores.dim() == 3 else None
    if q_counts is not None:
        checks.real_queries(q_counts, scores.shape[0], queries or 1, device)
    if mass_mean is None:
        checks.mass_for(config.mass)
        mass_mean = mass
    if queries is not None:
        scores, mass, mass_mean = scores.flatten(0, 1), mass.flatten(), mass_mean.flatten()
    params = Params(scale=1.0, window=0 if window is None else checks.window(window))
    params, policy = budget(params, config, visual, scores.shape[0], device)
    cuts = (starts, lengths)
    scored = Scored(scores, mass, mass_mean, visual, params, *cuts, workspace, q_counts, selected)
    if policy is not None:
        scored = _asked(policy, scored)
    name = backend or config.backend
    return _backend(name, device, lambda b: b.refuses_select(scored), queries).select(scored)


def attend(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens | None = None,
    selection: Selection | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    q_counts: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend to the text tokens and to the kept visual tokens only.

    Defined, for one row and one query head h of KV head g, by

        kept = torch.cat([text_positions, selection.indices[:count]])    # of this row
        out = softmax(scale * q[h] @ k[g, kept].T) @ v[g, kept]

    Without `visual` and `selection` it is dense decode, over all visible keys. For `q` [B, Q, H, D]
    and `q_counts` see `decode`: each query is a row of the selection.
    """
    checks.both_or_neither(visual, selection)
    check(q, kv, visual)
    if selection is not None:
        rows = q.shape[:-2].numel()
        if not usual.selection(selection, rows, kv.device):
            checks.selection(selection, rows, kv.capacity, kv.device)
    if q_counts is not None:
        checks.query_counts(q_counts, q)
    if out is not None:
        checks.buffer("out", out, tuple(q.shape), q)
    params = numbers(q, scale, softcap, window)
    call = Call(q, kv, params, visual, selection, out, workspace=workspace, q_counts=q_counts)
    return _backend_of(call, backend or "auto").attend(call)


def explain(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens | None = None,
    config: PulseConfig | str = "10pct",
    *,
    backend: str | None = None,
) -> Choice:
    """Say which backend serves these tensors, and what stands against each of the others."""
    config = resolve_config(config)
    check(q, kv, visual)
    params = numbers(q)
    if visual is not None:
        params, _ = budget(params, config, visual, q.shape[:-2].numel(), q.device)
    call = Call(q, kv, params, visual)
    return choice(backend or config.backend, q.device, lambda b: b.against(call), count(q))


def check(q: Tensor, kv: Cache, visual: VisualTokens | None, *, needs_visual: bool = False) -> None:
    """Check one call against its cache; values too where they lie on the CPU."""
    if usual.attention(q, kv, visual) and (visual is not None or not needs_visual):
        return
    checks.cache(kv)
    checks.query(q, kv)
    checks.no_grad(q, kv.k_data, kv.v_data)
    if visual is not None or needs_visual:
        checks.visual_set(visual, kv.batch, kv.capacity, kv.device)
    checks.storages(q, kv, visual)
    if are_readable(kv.device):
        kv.validate()


def numbers(
    q: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Params:
    """Check the arguments of the logits; no budget yet."""
    if scale is softcap is window is None:
        return Params(q.shape[-1] ** -0.5)
    return Params(
        scale=q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale),
        softcap=0.0 if softcap is None else checks.positive("softcap", softcap),
        window=0 if window is None else checks.window(window),
    )


def budget(
    params: Params,
    config: PulseConfig,
    visual: VisualTokens,
    rows: int,
    device: torch.device,
) -> tuple[Params, Any]:
    """Put the config's numbers into `params`; also the policy, if it must run between stages."""
    if config.budget == "dynamic" and is_eager():
        return _dynamic(params, config, visual.max_count), None
    policy = budgets.policy_of(config.budget, config.ratio)
    low, high = config.ratio
    ratio = wanted = None
    between = policy
    if isinstance(policy, budgets.Policy):
        clamp, wanted = policy.clamp(), policy.wanted(rows, device)
        if clamp is not None:
            low, high = clamp
            ratio = policy.draw(rows, device)
        if clamp is not None or wanted is not None:
            between = None
    bound = checks.bound(policy.bound(visual.max_count), policy)
    return _chosen_by(config, params, low, high, bound, ratio, wanted), between


@lru_cache
def _dynamic(params: Params, config: PulseConfig, max_count: int) -> Params:
    """The numbers of the paper's budget, the clamped mass: the same in every step."""
    low, high = config.ratio
    return _chosen_by(config, params, low, high, _dynamic_bound(high, max_count))


def _chosen_by(
    config: PulseConfig,
    params: Params,
    low: float,
    high: float,
    bound: int,
    ratio: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Params:
    return params._replace(
        tau=config.tau,
        r_min=low,
        r_max=high,
        mass_of=config.mass,
        score=config.score,
        anchor_output=config.anchor_output,
        k_max=bound,
        ratio=ratio,
        wanted=wanted,
    )


_dynamic_bound = lru_cache(budgets.bound_count)


def k_max(config: PulseConfig, visual: VisualTokens) -> int:
    """The width of a selection, checked."""
    if config.budget == "dynamic" and is_eager():
        return _dynamic_bound(config.ratio[1], visual.max_count)
    policy = budgets.policy_of(config.budget, config.ratio)
    return checks.bound(policy.bound(visual.max_count), policy)


def _buffers(
    given: Selection | None,
    config: PulseConfig,
    visual: VisualTokens,
    rows: int,
    dtype: torch.dtype,
) -> Selection | None:
    """The caller's selection, checked to hold what this config selects."""
    if given is None:
        return None
    return checks.selection_buffers(given, rows, k_max(config, visual), dtype, visual.device)


def _backend(name: str, device: torch.device, against: Against, queries: int | None) -> Backend:
    """Resolve a backend; while torch compiles, the ops of the graph do so when they run."""
    if not is_eager():
        return Compiled(name)
    return fitted(resolve(name, device, against, queries), queries)


def _backend_of(call: Call, name: str) -> Backend:
    return _backend(name, call.q.device, lambda b: b.against(call), count(call.q))


def _asked(policy: Any, scored: Scored) -> Scored:
    """Ask a policy that runs between score and select for its K."""
    scores, params = scored.scores, scored.params
    rows = scored_as_rows(scored)
    n_visual = rows.visual.visible_counts(scores.shape[1], rows.starts, rows.lengths, params.window)
    mass = scored.mass if params.mass_of == "max" else scored.mass_mean
    wanted = checks.counts(policy.counts(mass, n_visual, scores), n_visual, policy)
    return scored._replace(params=params._replace(wanted=wanted))
