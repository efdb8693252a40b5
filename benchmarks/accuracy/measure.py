"""Let a model answer a set of pictures under one setting, and count what it got right."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import visionpulse as vp
from visionpulse import baselines
from visionpulse.data import trail

MOST_TOKENS = 64  # the longest right answer has 39


@dataclass(frozen=True)
class Row:
    """One line of the table: a name, and what is put on the model while it answers."""

    name: str
    group: str
    setting: vp.PulseConfig | Callable[[], baselines.Method] | None  # None is full attention


@dataclass
class Answers:
    """What a model said: per picture the tokens, and the share of visual tokens of each step."""

    tokens: list[list[int]]
    shares: list[np.ndarray]
    seconds: list[float]  # of every decode step of a batch


class Clock:
    """Times every decode step of a model: the whole forward, language head included."""

    def __init__(self, model) -> None:
        self.seconds, self._begun = [], 0.0
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True),
        ]

    def _begin(self, module, args, kwargs) -> None:
        self._begun = time.perf_counter()

    def _end(self, module, args, kwargs, output) -> None:
        if output.logits.shape[1] == 1 and kwargs.get("pixel_values") is None:
            self.seconds.append(time.perf_counter() - self._begun)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def inputs_of(drawn: Sequence[tuple[trail.Picture, trail.Question]]) -> dict:
    """What `generate` takes, for pictures of one size."""
    side = drawn[0][0].side
    ids = torch.tensor([trail.prefix(side) + question.prompt for _, question in drawn])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == trail.IMAGE).int(),
        "pixel_values": torch.from_numpy(trail.patches([picture for picture, _ in drawn])),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(drawn)),
    }


@contextmanager
def under(model, setting) -> Iterator[Callable[[int], list[np.ndarray]]]:
    """Put a setting on the model; gives what reads the shares of the last batch, by row."""
    if setting is None:
        yield lambda rows: [np.zeros(0)] * rows
    elif isinstance(setting, vp.PulseConfig):
        with vp.patch(model, setting, record=True) as session:

            def shares(rows: int) -> list[np.ndarray]:
                trace = session.trace
                counts = np.diff(trace.ends, prepend=0)
                share = counts / np.maximum(trace.n_visual, 1)
                steps = int(trace.step.max()) + 1 if len(trace) else 0
                total, times = np.zeros((rows, steps)), np.zeros((rows, steps))
                np.add.at(total, (trace.row, trace.step), share)  # several anchors: their mean
                np.add.at(times, (trace.row, trace.step), 1)
                session.reset_stats()
                return list(total / np.maximum(times, 1))

            yield shares
    else:
        with baselines.apply(model, setting()) as run:

            def shares(rows: int) -> list[np.ndarray]:
                found = [share.float().numpy() for share in run.shares]
                run.shares.clear()
                run.kept.clear()
                return list(np.stack(found, 1)) if found else [np.zeros(0)] * rows

            yield shares


def answer(
    model,
    drawn: Sequence[tuple[trail.Picture, trail.Question]],
    setting,
    *,
    batch: int = 50,
    tick: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Greedy answers to all pictures; `tick` hears how many are done."""
    made = Answers([], [], [])
    with under(model, setting) as shares_of:
        clock = Clock(model)
        try:
            for begin in range(0, len(drawn), batch):
                part = drawn[begin : begin + batch]
                given = inputs_of(part)
                out = model.generate(**given, do_sample=False, max_new_tokens=MOST_TOKENS)
                for row, share in zip(
                    out[:, given["input_ids"].shape[1] :].tolist(), shares_of(len(part)), strict=True
                ):
                    length = row.index(trail.END) + 1 if trail.END in row else len(row)
                    made.tokens.append(row[:length])
                    made.shares.append(share[: length - 1])  # the first token comes from prefill
                tick(len(made.tokens))
        finally:
            clock.close()
    made.seconds = clock.seconds
    return made


def hops_right(said: Sequence[int], answer: Sequence[int]) -> tuple[int, int]:
    """Hops read before the first wrong token, and hops of the answer."""
    same = next(
        (i for i, (a, b) in enumerate(zip(said, answer, strict=False)) if a != b),
        min(len(said), len(answer)),
    )
    hops = (len(answer) - 3) // trail.HOP
    return min(same // trail.HOP, hops), hops


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, square = right / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(drawn: Sequence[tuple[trail.Picture, trail.Question]], made: Answers) -> dict:
    """The numbers of one row."""
    wanted = [question.answer for _, question in drawn]
    right = [said == answer for said, answer in zip(made.tokens, wanted, strict=True)]
    hops = [hops_right(said, answer) for said, answer in zip(made.tokens, wanted, strict=True)]
    low, high = wilson(sum(right), len(right))
    steps = np.concatenate(made.shares)
    return {
        "n": len(right),
        "exact": sum(right) / len(right),
        "exact_low": low,
        "exact_high": high,
        "hops": sum(h for h, _ in hops) / sum(n for _, n in hops),
        "length": float(np.mean([len(said) for said in made.tokens])),
        "length_wanted": float(np.mean([len(answer) for answer in wanted])),
        "retention": float(steps.mean()) if len(steps) else None,
        "step_ms_p50": 1e3 * float(np.median(made.seconds)),
        "right": "".join("01"[r] for r in right),  # picture by picture, for paired comparisons
    }
