"""Let a model answer a set of pictures under one setting, and count what it got right."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from compared import methods

import visionpulse as vp
from visionpulse.data import trail
from visionpulse.data.tiny import Clock, inputs_of, until_end

MOST_TOKENS = 64  # the longest right answer has 39


@dataclass(frozen=True)
class Row:
    """One line of the table: a name, and what is put on the model while it answers."""

    name: str
    group: str
    setting: vp.PulseConfig | Callable[[], methods.Method] | None  # None is full attention


@dataclass
class Answers:
    """A model's answers: the tokens per picture, and the share of visual tokens in each step."""

    tokens: list[list[int]]
    shares: list[list[float]]
    seconds: list[float]  # of every decode step of a batch
    spent: float = 0.0  # seconds of processor time for all of it, prefill included

    def add(self, more: "Answers") -> None:
        self.tokens += more.tokens
        self.shares += more.shares
        self.seconds += more.seconds
        self.spent += more.spent


def answer(
    model,
    drawn: Sequence[tuple[trail.Picture, trail.Question]],
    settings: Mapping[str, Any],
    tick: Callable[[str], None] = lambda name: None,
    traces: dict[str, vp.Trace] | None = None,
) -> dict[str, Answers]:
    """Greedy answers to one batch of pictures under every setting; `tick` hears each name.

    `traces` is filled with what the steps of each PulseConfig kept.

    A setting is a PulseConfig, None for full attention, or what makes a baseline. The first two
    change decode steps alone, so they share one prefill, each with a copy of its cache; the first
    of them bears its time.
    """
    begun = time.process_time()
    inputs = inputs_of(drawn)
    made = {}

    def done(name: str, answers: Answers) -> None:
        nonlocal begun
        now = time.process_time()
        made[name], answers.spent, begun = answers, now - begun, now
        tick(name)

    pulses = {n: s for n, s in settings.items() if s is None or isinstance(s, vp.PulseConfig)}
    if pulses:
        for name, answers in _from_one_prefill(model, inputs, pulses, traces):
            done(name, answers)
    for name, make in settings.items():
        if name in pulses:
            continue
        with methods.apply(model, make()) as run, Clock(model) as clock:
            out = model.generate(**inputs, do_sample=False, max_new_tokens=MOST_TOKENS)
        shares = torch.stack(run.shares, 1).float().numpy()
        done(name, _answers(out, inputs, shares, clock))
    return {name: made[name] for name in settings}


def _from_one_prefill(
    model, inputs: dict, pulses: dict, traces: dict | None
) -> Iterator[tuple[str, Answers]]:
    from transformers import DynamicCache

    size = inputs["input_ids"].shape[1]
    with vp.patch(model, record=True) as session, torch.no_grad():
        cache = DynamicCache(config=model.config.text_config)
        logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits
        first = logits[:, -1].argmax(-1, keepdim=True)  # comes out of prefill, as in generate()
        ids = torch.cat([inputs["input_ids"], first], 1)
        for name, config in pulses.items():
            go_on = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "past_key_values": copy.deepcopy(cache),
                "max_new_tokens": MOST_TOKENS - 1,
            }
            session.reset_stats()
            with contextlib.ExitStack() as stack:
                clock = stack.enter_context(Clock(model))
                if config is None:
                    stack.enter_context(session.paused())
                else:
                    session.update(**{f.name: getattr(config, f.name) for f in fields(config)})
                out = model.generate(**go_on, do_sample=False)
            trace = None if config is None else session.trace
            if traces is not None and trace is not None:
                traces[name] = trace
            shares = None if not trace else _shares(trace, len(out))
            yield name, _answers(out, {"input_ids": ids[:, :size]}, shares, clock)


def _shares(trace: vp.Trace, rows: int) -> np.ndarray:
    """Share of visual tokens kept, [rows, steps]; of several anchors their mean."""
    share = np.diff(trace.ends, prepend=0) / np.maximum(trace.n_visual, 1)
    total = np.zeros((rows, int(trace.step.max()) + 1))
    times = np.zeros_like(total)
    np.add.at(total, (trace.row, trace.step), share)
    np.add.at(times, (trace.row, trace.step), 1)
    return total / np.maximum(times, 1)


def _answers(out: torch.Tensor, inputs: dict, shares: np.ndarray | None, clock: Clock) -> Answers:
    answered = [until_end(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
    # the first token comes from prefill; steps after an answer's end are not counted
    kept = [
        [] if shares is None else shares[b, : len(tokens) - 1].tolist()
        for b, tokens in enumerate(answered)
    ]
    return Answers(answered, kept, clock.seconds)


def hops_right(answered: Sequence[int], answer: Sequence[int]) -> tuple[int, int]:
    """Hops read before the first wrong token, and hops of the answer."""
    same = next(
        (i for i, (a, b) in enumerate(zip(answered, answer, strict=False)) if a != b),
        min(len(answered), len(answer)),
    )
    hops = (len(answer) - 3) // trail.HOP
    return min(same // trail.HOP, hops), hops


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, square = right / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(questions: Sequence[trail.Question], made: Answers) -> dict:
    """The numbers of one row."""
    wanted = [question.answer for question in questions]
    right = [answered == answer for answered, answer in zip(made.tokens, wanted, strict=True)]
    hops = [hops_right(*pair) for pair in zip(made.tokens, wanted, strict=True)]
    low, high = wilson(sum(right), len(right))
    steps = np.concatenate([np.asarray(shares) for shares in made.shares])
    return {
        "n": len(right),
        "exact": sum(right) / len(right),
        "exact_low": low,
        "exact_high": high,
        "hops": sum(h for h, _ in hops) / sum(n for _, n in hops),
        "length": float(np.mean([len(answered) for answered in made.tokens])),
        "length_wanted": float(np.mean([len(answer) for answer in wanted])),
        "retention": float(steps.mean()) if len(steps) else None,
        "step_ms_p50": 1e3 * float(np.median(made.seconds)),
        "spent_s": round(made.spent, 2),
        "right": "".join("01"[r] for r in right),  # picture by picture, for paired comparisons
    }
