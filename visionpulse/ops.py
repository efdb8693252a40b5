"""The functional ops: check, choose a backend, run it. Tensors in, tensors out.

In eager mode a call goes straight to its backend. While torch compiles, it goes through
`torch.ops.visionpulse`, which library.py defines.
"""

from typing import Any

import torch
from torch import Tensor

from . import budgets, checks, library
from .backends import Against, Backend, Choice, choice, mass_dtype, resolve
from .cache import Cache
from .call import Params
from .config import PulseConfig
from .config import resolve as resolve_config
from .selection import Selection
from .tensor_checks import are_readable
from .visual import VisualTokens
from .workspace import Workspace
from .workspace import default as default_workspace

compiling = torch.compiler.is_compiling


def decode(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens,
    config: PulseConfig | str = "10pct",
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    out: Tensor | None = None,
    scores: Tensor | None = None,
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

    `scores`, [B, N], is filled with the S that was ranked, -inf where there is no candidate.
    """
    config = resolve_config(config)
    check(q, kv, visual)
    checks.buffer("out", out, tuple(q.shape), q)
    checks.scores_buffer(scores, kv.batch, kv.capacity, q)
    params = numbers(q, scale, softcap, window)
    params, policy = budget(params, config, visual, q.shape[0], q.device)
    name = backend or config.backend
    if policy is None and not compiling():
        runner = backend_for(name, q, kv, visual, params)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        work = workspace or default_workspace(q.device)
        return out, runner.decode(q, kv, visual, params, scores=scores, out=out, workspace=work)
    if policy is None and scores is None:
        fields = library.cache_fields(kv) + library.visual_fields(visual)
        result, indices, counts, mass, mass_mean = torch.ops.visionpulse.decode(
            q, *fields, *_scoring(params), *_budgeting(params), name
        )
        return _into(out, result), Selection(indices, counts, mass, mass_mean, trusted=True)
    return _staged(q, kv, visual, params, policy, out, scores, workspace, name)


def score(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens,
    config: PulseConfig | str = "10pct",
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    workspace: Workspace | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank the visual tokens: scores [B, N], largest and mean mass of the heads [B].

    Defined by the lines of `decode` that give S and M; -inf where there is no candidate.
    """
    config = resolve_config(config)
    check(q, kv, visual)
    params = numbers(q, scale, softcap, window)
    params = params._replace(tau=config.tau, mass_of=config.mass, score=config.score)
    name = backend or config.backend
    return _run_score(q, kv, visual, params, workspace, name)[:3]


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
    workspace: Workspace | None = None,
    backend: str | None = None,
) -> Selection:
    """Keep the K best visual tokens of each row, K from the mass.

    Defined, for one row with candidates V, by

        K = floor(clamp(mass, r_min, r_max) * len(V))             # at least 1
        kept = V[scores[V].topk(K).indices].sort().values         # ties: the lowest position

    `mass_mean` is needed where the config asks for mass="mean"; `starts`, `lengths` and `window`
    cut the candidates as they cut the keys.
    """
    config = resolve_config(config)
    checks.ranked(scores, mass, mass_mean)
    checks.visual_set(visual, scores.shape[0], scores.shape[1], scores.device)
    for cut, rows in (("starts", starts), ("lengths", lengths)):
        checks.row_cut(cut, rows, scores)
    if mass_mean is None:
        checks.mass_for(config.mass)
        mass_mean = mass
    params = Params(scale=1.0, window=0 if window is None else checks.window(window))
    params, policy = budget(params, config, visual, scores.shape[0], scores.device)
    if policy is not None:
        bounds = (scores.shape[1], starts, lengths, params.window)
        chosen = mass if config.mass == "max" else mass_mean
        params = params._replace(wanted=_counts(policy, chosen, visual, scores, bounds))
    name = backend or config.backend
    return _run_select(scores, mass, mass_mean, visual, params, starts, lengths, workspace, name)


def attend(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens | None = None,
    selection: Selection | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend to the text tokens and to the kept visual tokens only.

    Defined, for one row and one query head h of KV head g, by

        kept = torch.cat([text_positions, selection.indices[:count]])    # of this row
        out = softmax(scale * q[h] @ k[g, kept].T) @ v[g, kept]

    Without `visual` and `selection` it is dense decode, over all visible keys.
    """
    checks.both_or_neither(visual, selection)
    check(q, kv, visual)
    if selection is not None:
        checks.selection(selection, kv.batch, kv.capacity, kv.device)
    checks.buffer("out", out, tuple(q.shape), q)
    params = numbers(q, scale, softcap, window)
    return _run_attend(q, kv, visual, selection, params, out, workspace, backend or "auto")


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
    params = numbers(q, None, None, None)
    if visual is not None:
        params, _ = budget(params, config, visual, q.shape[0], q.device)
    against = _against(q, kv, visual, params)
    return choice(backend or config.backend, q.device, against)


def check(q: Tensor, kv: Cache, visual: VisualTokens | None) -> None:
    """Check one call against its cache; values too where they lie on the CPU."""
    checks.cache(kv)
    checks.query(q, kv)
    checks.no_grad(q, kv.k_data, kv.v_data)
    if visual is not None:
        checks.visual_set(visual, kv.batch, kv.capacity, kv.device)
    if are_readable(kv.device):
        kv.validate()


def numbers(q: Tensor, scale: float | None, softcap: float | None, window: int | None) -> Params:
    """Check the arguments of the logits; no budget yet."""
    return Params(
        scale=q.shape[2] ** -0.5 if scale is None else checks.number("scale", scale),
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
    params = params._replace(
        tau=config.tau,
        r_min=low,
        r_max=high,
        mass_of=config.mass,
        score=config.score,
        anchor_output=config.anchor_output,
        k_max=checks.bound(policy.bound(visual.max_count), policy),
        ratio=ratio,
        wanted=wanted,
    )
    return params, between


def _counts(
    policy: Any,
    mass: Tensor,
    visual: VisualTokens,
    scores: Tensor,
    bounds: tuple[int, Tensor | None, Tensor | None, int],
) -> Tensor:
    """Ask a policy that runs between score and select for its K."""
    size, starts, lengths, window = bounds
    n_visual = visual.visible_counts(size, starts, lengths, window)
    return checks.counts(policy.counts(mass, n_visual, scores), n_visual, policy)


def _staged(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens,
    params: Params,
    policy: Any,
    out: Tensor | None,
    scores: Tensor | None,
    workspace: Workspace | None,
    name: str,
) -> tuple[Tensor, Selection]:
    """Decode in three calls, for a policy that runs between them."""
    ranked, mass, mass_mean, dense = _run_score(q, kv, visual, params, workspace, name, scores)
    if policy is not None:
        bounds = (kv.capacity, kv.starts, kv.lengths, params.window)
        chosen = mass if params.mass_of == "max" else mass_mean
        params = params._replace(wanted=_counts(policy, chosen, visual, ranked, bounds))
    selection = _run_select(
        ranked, mass, mass_mean, visual, params, kv.starts, kv.lengths, workspace, name
    )
    if dense is not None:
        return _into(out, dense), selection
    return _run_attend(q, kv, visual, selection, params, out, workspace, name), selection


def _run_score(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens,
    params: Params,
    workspace: Workspace | None,
    name: str,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dense = params.anchor_output == "dense"
    if compiling():
        fields = library.cache_fields(kv) + library.visual_fields(visual)
        ranked, mass, mass_mean, out = torch.ops.visionpulse.score(
            q, *fields, *_scoring(params), name
        )
        return _into(scores, ranked), mass, mass_mean, out if dense else None
    runner = backend_for(name, q, kv, visual, params)
    if scores is None:
        shape = (kv.batch, kv.capacity)
        scores = torch.empty(shape, dtype=mass_dtype(q), device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if dense else None
    work = workspace or default_workspace(q.device)
    mass, mass_mean = runner.score(q, kv, visual, params, scores=scores, out=out, workspace=work)
    return scores, mass, mass_mean, out


def _run_select(
    scores: Tensor,
    mass: Tensor,
    mass_mean: Tensor,
    visual: VisualTokens,
    params: Params,
    starts: Tensor | None,
    lengths: Tensor | None,
    workspace: Workspace | None,
    name: str,
) -> Selection:
    if compiling():
        indices, counts = torch.ops.visionpulse.select(
            scores, mass, mass_mean, *library.visual_fields(visual), starts, lengths,
            params.window, *_budgeting(params), name,
        )  # fmt: skip
        return Selection(indices, counts, mass, mass_mean, trusted=True)
    runner = resolve(name, scores.device, lambda b: b.refuses_select(scores, params))
    return runner.select(
        scores,
        mass,
        mass_mean,
        visual,
        params,
        starts=starts,
        lengths=lengths,
        workspace=workspace or default_workspace(scores.device),
    )


def _run_attend(
    q: Tensor,
    kv: Cache,
    visual: VisualTokens | None,
    selection: Selection | None,
    params: Params,
    out: Tensor | None,
    workspace: Workspace | None,
    name: str,
) -> Tensor:
    if compiling():
        fields, math_ = library.cache_fields(kv), (params.scale, params.softcap, params.window)
        if visual is None or selection is None:
            return _into(out, torch.ops.visionpulse.attend_dense(q, *fields, *math_, name))
        result = torch.ops.visionpulse.attend(
            q, *fields, *library.visual_fields(visual), selection.indices, selection.counts,
            *math_, name,
        )  # fmt: skip
        return _into(out, result)
    runner = backend_for(name, q, kv, visual, params)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    work = workspace or default_workspace(q.device)
    return runner.attend(q, kv, visual, selection, params, out=out, workspace=work)


def _against(q: Tensor, kv: Cache, visual: VisualTokens | None, params: Params) -> Against:
    return lambda backend: backend.refuses(q, kv, visual, params)


def backend_for(
    name: str, q: Tensor, kv: Cache, visual: VisualTokens | None, params: Params
) -> Backend:
    """Resolve a backend for these tensors."""
    return resolve(name, q.device, _against(q, kv, visual, params))


def _scoring(params: Params) -> tuple[Any, ...]:
    math_ = (params.scale, params.softcap, params.window)
    return *math_, params.tau, params.score, params.anchor_output


def _budgeting(params: Params) -> tuple[Any, ...]:
    clamp = (params.r_min, params.r_max, params.mass_of)
    return *clamp, params.k_max, params.ratio, params.wanted


def _into(given: Tensor | None, result: Tensor) -> Tensor:
    return result if given is None else given.copy_(result)
