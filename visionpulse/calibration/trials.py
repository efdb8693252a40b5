"""A setting run along dense answers: how often it would write another token, and how far off."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import PulseConfig
from ..models import Session, patch
from .observe import Observation

BEARS = 0.98  # share of steps that write the dense model's token, below which a setting is no use


@dataclass(frozen=True)
class Trial:
    """One setting, run along the dense answers."""

    config: PulseConfig
    name: str
    steps: int  # decode steps compared
    differs: int  # steps in which the most likely token is another
    distance: float  # mean Kullback-Leibler divergence of dense from sparse, nats per step
    retention: float  # mean share of visual tokens kept

    @property
    def agreement(self) -> float:
        """Share of steps that write the dense model's token."""
        return 1 - self.differs / self.steps

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the agreement; steps of one answer are not independent."""
        z2, n, p = 1.96**2, self.steps, self.agreement
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)


class ForcedAnswers:
    """Runs settings along the dense answers and compares what the model would write."""

    def __init__(
        self, model: Any, batches: Sequence[Mapping[str, Any]], seen: Observation, options: Any
    ) -> None:
        self.model, self.batches, self.options = model, batches, options
        self.answers: list[list[tuple[int, ...]]] = []
        rows = iter(seen.answers)
        for batch in batches:
            self.answers.append([next(rows) for _ in range(len(batch["input_ids"]))])
        self.dense = [made for made in self._logits()]  # per input [B, T, vocabulary]

    def _logits(self) -> Iterator[Tensor]:
        for batch, answers in zip(self.batches, self.answers, strict=True):
            yield along(self.model, batch, answers, self.options)

    def run(self, name: str, config: PulseConfig) -> Trial:
        """Compare one setting with the dense answers."""
        return self.follow(name, config)[0]

    def follow(
        self, name: str, config: PulseConfig, record: bool = False
    ) -> tuple[Trial, list[Tensor], Session]:
        """The same, with the likeliest token of each place, by input [B, T - 1]; -1 is no place."""
        steps = differs = 0
        distance, said = 0.0, []
        with patch(self.model, config, record=record) as session:
            for dense, sparse, answers in zip(
                self.dense, self._logits(), self.answers, strict=True
            ):
                lengths = torch.tensor([len(answer) for answer in answers])
                live = torch.arange(1, dense.shape[1] + 1) < lengths[:, None]  # [B, T - 1]
                live = live.to(dense.device)
                apart = (dense.exp() * (dense - sparse).nan_to_num(0.0)).sum(-1)
                said.append(sparse.argmax(-1).masked_fill(~live, -1))
                differs += int((dense.argmax(-1) != said[-1])[live].sum())
                distance += float(apart[live].clamp(min=0).sum())
                steps += int(live.sum())
            retention = session.stats.retention.mean
        trial = Trial(config, name, steps, differs, distance / max(steps, 1), retention)
        return trial, said, session


def along(
    model: Any, batch: Mapping[str, Any], answers: Sequence[tuple[int, ...]], options: Any
) -> Tensor:
    """Log-probabilities of every position of the answers but the first, [B, T - 1, vocabulary]."""
    from transformers import LogitsProcessorList

    path, size = _padded(answers), batch["input_ids"].shape[1]
    logits: list[Tensor] = []

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        at = ids.shape[1] - size
        if at:
            logits.append(scores.float().log_softmax(-1))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, path[:, at : at + 1].to(scores.device), 0.0)

    model.generate(
        **batch, **(options | {"do_sample": False}), max_new_tokens=path.shape[1],
        logits_processor=LogitsProcessorList([force]),
    )  # fmt: skip
    return torch.stack(logits, 1)


def _padded(answers: Sequence[tuple[int, ...]]) -> Tensor:
    """Answers as one tensor [B, T], each repeated at its end."""
    longest = max(len(answer) for answer in answers)
    rows = [list(answer) + [answer[-1]] * (longest - len(answer)) for answer in answers]
    return torch.tensor(rows)
