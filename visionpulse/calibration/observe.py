"""What dense decode steps attend to: mass, activated tokens and rankings of every layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..cache import KVCache
from .method import Method, Run, apply
from .prompt import Prompt

TAUS = (1.0, 0.7, 0.4, 0.2, 0.1, 0.05)
THRESHOLDS = (0.0005, 0.001, 0.0015, 0.002)  # of the paper; a token is active above one
RATIOS = (0.005, 0.01, 0.02, 0.05, 0.10, 0.20)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Observation:
    """Dense steps of some prompts, one entry per step and row that was still writing.

    E entries, L full-attention layers, in the order of `layers`.
    """

    layers: tuple[int, ...]
    taus: tuple[float, ...]
    thresholds: tuple[float, ...]
    ratios: tuple[float, ...]
    prompt: Ints  # [E], which row of which input
    step: Ints  # [E]
    n_visual: Ints  # [E]
    mass: Floats  # [E, L, taus], of the head with the largest
    mass_mean: Floats  # [E, L], mean of the heads, tau 1
    active: Ints  # [E, L, thresholds], tokens whose head-mean attention is above
    similarity: Floats  # [E, L, L], cosine of the head-mean attention to visual tokens
    captured: Floats  # [E, L, L, ratios], share of the second layer's visual mass that lies on the
    # tokens which the first ranks highest
    never: Floats  # [prompts, L, thresholds], share of visual tokens active in no step
    answers: tuple[tuple[int, ...], ...]  # by prompt, the tokens generated

    def __len__(self) -> int:
        return len(self.step)

    def index_of(self, layer: int) -> int:
        """The index of a layer in the arrays."""
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise ValueError(f"layer {layer} was not observed; known: {known}")
        return self.layers.index(layer)


class AttentionObserver(Method):
    """Dense attention that records how much each visual token receives."""

    needs_full_layers = False

    def __init__(
        self, taus: Sequence[float], thresholds: Sequence[float], ratios: Sequence[float]
    ) -> None:
        self.taus, self.thresholds, self.ratios = taus, thresholds, ratios

    def prepare(self, run: Run) -> None:
        """Take the layers with full attention."""
        self.layers = tuple(i for i, is_full in enumerate(run.parts.full) if is_full)
        self.steps: list[dict[str, Tensor]] = []
        self._ever: Tensor | None = None
        self._shares: list[Tensor] = []
        self._masses: list[Tensor] = []
        self._means: list[Tensor] = []

    def decode(self, prompt: Prompt, layer: int, q: Tensor, kv: KVCache, scale: float) -> Tensor:
        """Attend to all keys, and record the attention."""
        visual = prompt.visual  # [B, N] of the prompt; what follows it is text
        z = (
            scale
            * q.float().view(len(q), kv.kv_heads, -1, kv.head_dim)
            @ kv.k.float().transpose(2, 3)
        )
        z = z.flatten(1, 2)  # [B, H, keys]
        slots = torch.arange(z.shape[-1], device=z.device)
        if kv.starts is not None:
            z = z.masked_fill((slots < kv.starts[:, None])[:, None], -torch.inf)
        size = visual.shape[1]
        masses = []
        for tau in self.taus:
            share = (z / tau).softmax(-1)[..., :size] * visual[:, None]
            masses.append(share.sum(-1).amax(-1))
        share = z.softmax(-1)[..., :size].mean(1) * visual  # [B, N]
        self._shares.append(share)
        self._masses.append(torch.stack(masses, -1))
        self._means.append(share.sum(-1))
        if layer == self.layers[-1]:
            self._record(prompt)
        return ops.attend(q, kv, scale=scale)

    def _record(self, prompt: Prompt) -> None:
        """Record the step that has just ended."""
        share = torch.stack(self._shares, 1)  # [B, L, N]
        limits = torch.tensor(self.thresholds, device=share.device)
        active = share[..., None] > limits  # [B, L, N, thresholds]
        if prompt.step == 0 or self._ever is None:
            self._ever = torch.zeros_like(active)
        self._ever = self._ever | active
        unit = torch.nn.functional.normalize(share, dim=-1)
        counts = prompt.counts
        self.steps.append(
            {
                "mass": torch.stack(self._masses, 1),
                "mass_mean": torch.stack(self._means, 1),
                "active": active.sum(2),
                "similarity": unit @ unit.transpose(1, 2),
                "captured": self._captured(share, prompt),
                "n_visual": counts,
                "ever": self._ever.sum(2) / counts[:, None, None].clamp(min=1),
            }
        )
        self._shares, self._masses, self._means = [], [], []

    def _captured(self, share: Tensor, prompt: Prompt) -> Tensor:
        """[B, L, L, ratios]: the share of one layer's mass on the best of another (the first)."""
        ranked = share.masked_fill(~prompt.visual[:, None], -1.0)
        order = ranked.argsort(-1, descending=True)  # [B, L, N]
        captured = []
        for i in range(share.shape[1]):
            at = order[:, i, None].expand_as(share)
            running = share.gather(2, at).cumsum(-1)  # [B, L, N] of every layer, in i's order
            total = running[..., -1:].clamp(min=1e-12)
            places = [prompt.wanted(ratio)[:, None, None] - 1 for ratio in self.ratios]
            index = torch.cat(places, -1).clamp(min=0).expand(-1, share.shape[1], -1)
            captured.append(running.gather(2, index) / total)
        return torch.stack(captured, 1)


def observe(
    model: Any,
    inputs: "Mapping[str, Any] | Sequence[Mapping[str, Any]]",
    *,
    max_new_tokens: int = 64,
    taus: Sequence[float] = TAUS,
    thresholds: Sequence[float] = THRESHOLDS,
    ratios: Sequence[float] = RATIOS,
    tick: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> Observation:
    """Let the model answer `inputs` densely and observe every decode step.

    `inputs` are what `model.generate` takes, or several of them; `options` go to `generate`. `tick`
    is called with the count of inputs that are done.
    """
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    observer = AttentionObserver(taus, thresholds, ratios)
    parts: list[dict[str, Any]] = []
    never: list[Any] = []
    answers: list[tuple[int, ...]] = []
    options = {"do_sample": False} | options
    with apply(model, observer):
        for done, one in enumerate(batches, 1):
            observer.steps = []
            out = model.generate(**one, max_new_tokens=max_new_tokens, **options)
            rows = out[:, one["input_ids"].shape[1] :].tolist()
            ends = _ends(model)
            for b, row in enumerate(rows):
                length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
                steps = observer.steps[: length - 1]  # the first token comes from prefill
                parts += [_entry(note, b, len(answers), step) for step, note in enumerate(steps)]
                if steps:
                    never.append(1 - steps[-1]["ever"][b].float().cpu().numpy())
                answers.append(tuple(row[:length]))
            tick(done)
    if not answers:
        raise ValueError("no inputs to observe; give at least one batch of what generate() takes")
    if not parts:
        raise ValueError(
            "no decode step was seen: every answer ended with its first token; "
            "raise max_new_tokens or give prompts that are answered at length"
        )
    stacked: dict[str, Any] = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    settings = (observer.layers, tuple(taus), tuple(thresholds), tuple(ratios))
    return Observation(*settings, **stacked, never=np.stack(never), answers=tuple(answers))


def _entry(note: dict[str, Tensor], row: int, prompt: int, step: int) -> dict[str, Any]:
    numbers: dict[str, Any] = {"prompt": prompt, "step": step}
    return numbers | {n: part[row].cpu().numpy() for n, part in note.items() if n != "ever"}


def _ends(model: Any) -> set[int]:
    """Tokens that end an answer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list | tuple) else {int(ids)}
