"""Would lossless decoding pay on this model and machine: acceptance of drafts, costs of rounds.

1. The model answers densely, and each way to draft runs along these answers, one token at a time:
   in which places it says the dense model's token. Rounds of any length are counted from that.
2. Steps and checks are timed on the first input; the fastest of each counts.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import PulseConfig, config_data
from ..config import resolve as resolve_config
from ..files import write_text
from ..models import patch
from ..models.draft_policy import ways_of
from ..models.families import UnsupportedModelError, anatomy
from ..models.layer_roles import LayerRoles
from ..models.lossless import refuse
from .trials import along

DRAFTS = (1, 2, 4, 8, 15)  # tokens that a round drafts
ROUNDS = 4  # that are timed of each


class Round(NamedTuple):
    """One round along an answer."""

    begin: int  # place of its first token
    tried: int
    took: int


def rounds_of(answer: Sequence[bool], drafted: int) -> Iterator[Round]:
    """The rounds along one answer, in whose places the draft is right or not."""
    begin = 0
    while begin < len(answer):
        run = answer[begin : begin + drafted]
        took = next((i for i, right in enumerate(run) if not right), len(run))
        yield Round(begin, len(run), took)
        begin += took + 1


def accepted_of(says: Sequence[Sequence[bool]], drafted: int) -> tuple[int, int, int]:
    """Checks, drafted and accepted tokens of rounds along some answers.

    `says` is, of each answer, whether the draft says the dense model's token in each place.
    """
    rounds = [each for answer in says for each in rounds_of(answer, drafted)]
    return len(rounds), sum(each.tried for each in rounds), sum(each.took for each in rounds)


def accepted_by_kind(
    says: Sequence[Sequence[bool]], kinds: Sequence[Sequence[str]], drafted: int
) -> dict[str, tuple[int, int]]:
    """Drafted and accepted tokens of each kind; `kinds` names that of each place, or is ""."""
    counts: dict[str, tuple[int, int]] = {}
    for answer, of_answer in zip(says, kinds, strict=True):
        for begin, tried, took in rounds_of(answer, drafted):
            for place in range(begin, begin + tried):
                n, right = counts.get(of_answer[place], (0, 0))
                counts[of_answer[place]] = n + 1, right + (place < begin + took)
    counts.pop("", None)
    return dict(sorted(counts.items()))


@dataclass(frozen=True)
class Drafts:
    """One way to draft, by the tokens that a round drafts."""

    name: str
    config: PulseConfig
    retention: float  # mean share of visual tokens kept
    says: list[list[bool]]  # of each answer, in each place
    step_seconds: float
    check_seconds: dict[int, float]

    def acceptance(self, drafted: int) -> float:
        """Share of drafted tokens that are accepted."""
        _, tried, accepted = accepted_of(self.says, drafted)
        return accepted / max(tried, 1)

    def kind_rates(self, kinds: Sequence[Sequence[str]], drafted: int) -> dict[str, float]:
        """The same of each kind of token."""
        counts = accepted_by_kind(self.says, kinds, drafted)
        return {kind: accepted / tried for kind, (tried, accepted) in counts.items()}

    def tokens_per_check(self, drafted: int) -> float:
        """Tokens that one check gives on average."""
        checks, _, accepted = accepted_of(self.says, drafted)
        return (checks + accepted) / max(checks, 1)

    def token_seconds(self, drafted: int) -> float:
        """Seconds of a token."""
        seconds = drafted * self.step_seconds + self.check_seconds[drafted]
        return seconds / self.tokens_per_check(drafted)


@dataclass(frozen=True)
class AcceptanceReport:
    """What lossless decoding would give; print it."""

    answers: int
    places: int  # tokens of the answers but the first of each
    own_seconds: float  # a dense step of the model's own attention
    dense_seconds: float  # of our dense kernels
    drafts: list[Drafts]
    kinds: Sequence[Sequence[str]] = ()  # of each answer, in each place; none are known: ()

    @property
    def best(self) -> tuple[Drafts, int]:
        """What costs least a token, and how many tokens it drafts."""
        pairs = [(each, n) for each in self.drafts for n in DRAFTS]
        return min(pairs, key=lambda pair: pair[0].token_seconds(pair[1]))

    def __str__(self) -> str:
        best, drafted = self.best
        gain = self.dense_seconds / best.token_seconds(drafted)
        lines = [
            f"Answers: {self.answers}, with {self.places} places. A dense step takes",
            f"{1e3 * self.own_seconds:.2f} ms by the model's own attention, "
            f"{1e3 * self.dense_seconds:.2f} ms by our dense kernels.",
            "",
            "share of drafted tokens accepted / tokens a check, by tokens drafted a round",
            _line(f"{'kept':>30}", (str(n) for n in DRAFTS)),
        ]
        for each in self.drafts:
            cells = (f"{each.acceptance(n):.2f}/{each.tokens_per_check(n):.1f}" for n in DRAFTS)
            kept = f"{100 * each.retention:.1f} %"
            lines.append(_line(f"{each.name:<23}{kept:>7}", cells))
        lines += self._by_kind()
        lines += ["", "expected speed over our dense kernels"]
        for each in self.drafts:
            cells = (f"{self.dense_seconds / each.token_seconds(n):.2f}x" for n in DRAFTS)
            lines.append(_line(each.name, cells))
        own = self.own_seconds / best.token_seconds(drafted)
        if gain > 1:
            verdict = (
                f"it pays: {best.name}, {drafted} drafted tokens, {gain:.2f}x our dense steps;\n"
            )
        else:
            verdict = f'it does not pay here (at best {gain:.2f}x): vp.patch(model, "dense")\n'
            verdict += "is as exact, and faster; "
        return "\n".join([*lines, "", f"{verdict}{own:.2f}x the model's own."])

    def _by_kind(self) -> list[str]:
        """Lines of acceptance by what a token is, where that is known."""
        if not self.kinds:
            return []
        lines = ["", "accepted of drafted tokens, by what they are"]
        for each in self.drafts:
            rates = [each.kind_rates(self.kinds, n) for n in DRAFTS]
            for kind in sorted({kind for rate in rates for kind in rate}):
                cells = (f"{rate[kind]:.3f}" if kind in rate else "" for rate in rates)
                name = f"{each.name}: {kind}"
                lines.append(_line(name, cells))
        return lines

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the numbers as JSON."""
        data: dict[str, Any] = {
            "answers": self.answers, "places": self.places,
            "own_seconds": self.own_seconds, "dense_seconds": self.dense_seconds,
            "drafts": [
                {
                    "name": each.name, "config": config_data(each.config),
                    "retention": each.retention, "step_seconds": each.step_seconds,
                    "rounds": [
                        {
                            "drafted": n, "acceptance": each.acceptance(n),
                            "tokens_per_check": each.tokens_per_check(n),
                            "check_seconds": each.check_seconds[n],
                            "expected_speed": self.dense_seconds / each.token_seconds(n),
                            "by_kind": each.kind_rates(self.kinds, n) if self.kinds else {},
                        }
                        for n in DRAFTS
                    ],
                    "says": ["".join("01"[right] for right in answer) for answer in each.says],
                }
                for each in self.drafts
            ],
        }  # fmt: skip
        return write_text(path, json.dumps(data, indent=1) + "\n")


def _line(name: str, cells: Iterable[str]) -> str:
    """A name and a cell for each number of drafted tokens, in 80 columns."""
    return f"{name:<30}" + "".join(f"{cell:>10}" for cell in cells)


def measure_acceptance(
    model: Any,
    inputs: Sequence[Mapping[str, Any]],
    config: PulseConfig | str = "10pct",
    *,
    max_new_tokens: int = 64,
    kinds_of: Callable[[int, list[int]], Sequence[str]] | None = None,
    tick: Callable[[str, int, int], None] = lambda what, done, total: None,
    **options: Any,
) -> AcceptanceReport:
    """Measure on `inputs`, one row each, what `model.generate` takes. `options` go to `generate`.

    The ways to draft are those that `patch(..., lossless=True)` tries for this setting. `kinds_of`
    names the kind of each token of an answer to input i, or "".
    """
    if not inputs or any(len(each["input_ids"]) != 1 for each in inputs):
        raise ValueError("acceptance is measured on inputs of one row each, at least one")
    parts = anatomy(model)
    refuse(parts)
    roles = LayerRoles.of(resolve_config(config), parts)
    able = [i for i, is_full in enumerate(parts.full) if is_full][:-1]
    ways = {name_of(way): way for way in ways_of(roles.config, roles.anchors, able)}
    greedy = options | {"do_sample": False}
    answers = []
    for done, each in enumerate(inputs, 1):
        out = model.generate(**each, **greedy, max_new_tokens=max_new_tokens)
        answers.append(out[0, each["input_ids"].shape[1] :].tolist())
        tick("dense answers", done, len(inputs))
    own = _plain_seconds(model, inputs[0], greedy, None)
    dense = _plain_seconds(model, inputs[0], greedy, "dense")
    drafts = []
    for done, (name, way) in enumerate(ways.items(), 1):
        says, retention = _says(model, inputs, answers, way, greedy)
        step, checks = _round_seconds(model, inputs[0], greedy, way)
        drafts.append(Drafts(name, way, retention, says, step, checks))
        tick("ways to draft", done, len(ways))
    places = sum(max(len(answer) - 1, 0) for answer in answers)
    kinds = [
        kinds_of(i, answer)[1:] for i, answer in enumerate(answers) if kinds_of and len(answer) > 1
    ]
    return AcceptanceReport(len(answers), places, own, dense, drafts, kinds)


def name_of(config: PulseConfig) -> str:
    """A way to draft, in words."""
    if config.schedule == "per_layer" or config.anchor is None:
        return config.schedule
    if isinstance(config.anchor, tuple):
        return f"{config.schedule}, anchors {' and '.join(map(str, config.anchor))}"
    return f"{config.schedule}, anchor {config.anchor}"


def _says(
    model: Any, inputs: Any, answers: Any, way: PulseConfig, options: dict[str, Any]
) -> tuple[list[list[bool]], float]:
    """In which places of each answer the sparse model says the dense model's token."""
    says = []
    with patch(model, way) as session:
        for each, answer in zip(inputs, answers, strict=True):
            if len(answer) < 2:
                continue
            said = along(model, each, [tuple(answer)], options).argmax(-1)[0].tolist()
            says.append([a == b for a, b in zip(said, answer[1:], strict=True)])
        return says, session.stats.retention.mean


def _plain_seconds(
    model: Any, inputs: Mapping[str, Any], options: dict[str, Any], preset: str | None
) -> float:
    """Seconds of a dense step: of the unpatched model, or under a preset."""
    begins: list[float] = []

    def note(*_: Any) -> None:
        begins.append(time.perf_counter())

    handle = model.register_forward_pre_hook(note)
    session = None if preset is None else patch(model, preset)
    try:
        _generate(model, inputs, options, 4 * ROUNDS)
    finally:
        handle.remove()
        if session is not None:
            session.unpatch()
    return min(b - a for a, b in pairwise(begins[1:]))  # without the prefill


def _round_seconds(
    model: Any, inputs: Mapping[str, Any], options: dict[str, Any], way: PulseConfig
) -> tuple[float, dict[int, float]]:
    """Seconds of a draft step, and of a check by the tokens of its draft."""
    steps: list[float] = []
    checks: dict[int, float] = {}
    for drafted in DRAFTS:
        with patch(model, way, lossless=True, draft=drafted) as session:
            _generate(model, inputs, options, ROUNDS * (drafted + 1) + 1)
            times = session.round_seconds
        if not times:
            raise UnsupportedModelError(
                "no round ran ahead: the first input has no picture, or its answer ends at once"
            )
        steps += [draft / drafted for draft, _ in times]
        checks[drafted] = min(check for _, check in times)
    return min(steps), checks


def _generate(model: Any, inputs: Mapping[str, Any], options: dict[str, Any], tokens: int) -> None:
    """Generate exactly so many tokens."""
    more = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with torch.no_grad():
        model.generate(**inputs, **options, **more)
