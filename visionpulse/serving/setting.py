"""What one engine was asked for, checked against what the engine is about to do.

Free of any engine: an adapter describes itself as an `Engine`, its obstacles in its own flags.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import budgets, schedule
from ..config import PRESETS, PulseConfig, resolve
from ..schedule import Role

KEY = "visionpulse"
ENVIRONMENT = "VISIONPULSE_SERVING"  # the same JSON, for launchers that pass no config
PRESET = "10pct"
OFF = "off"


class Obstacle(NamedTuple):
    """What an engine does that decode rows cannot be served with."""

    what: str
    way_out: str  # names the flag


@dataclass(frozen=True)
class Engine:
    """The facts about an engine that decide what can be served."""

    full: tuple[bool, ...]  # for each layer of the language model: full attention
    heads: int  # query heads of all ranks together
    stages: tuple[tuple[int, int], ...] = ()  # layers [begin, end) of each pipeline stage
    tensor_ranks: int = 1
    device: str = "cpu"
    has_graphs: bool = False  # steps are captured, so nothing runs on the host between stages
    has_drafts: bool = False  # speculative decoding: a row may have several tokens
    obstacles: tuple[Obstacle, ...] = ()


@dataclass(frozen=True)
class Setting:
    """The config of the method and the role of every layer."""

    config: PulseConfig
    engine: Engine
    roles: tuple[Role, ...]  # of a step that follows a kept selection, where the schedule has one

    @property
    def looks_back(self) -> bool:
        """Whether layers before the anchor follow what the last step kept."""
        return self.config.schedule == "lookback"

    @property
    def anchors(self) -> tuple[int, ...]:
        """The layers that select."""
        return tuple(i for i, role in enumerate(self.roles) if role is Role.ANCHOR)


def asked_of(given: Any) -> dict[str, Any] | None:
    """What an engine's config, or else the environment, asks for; None where nobody asked."""
    if given is None and (text := os.environ.get(ENVIRONMENT)):
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{ENVIRONMENT} must hold JSON such as {{"preset": "10pct"}}: {error}'
            ) from error
    if given is None or given is False:
        return None
    if isinstance(given, str):
        given = {"preset": given}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{KEY} takes a preset or an object of settings, got {type(given).__name__}; "
            f'write {{"{KEY}": {{"preset": "10pct"}}}}'
        )
    return None if given.get("preset") == OFF else dict(given)


def config_of(asked: Mapping[str, Any]) -> PulseConfig:
    """The config that a mapping of JSON values names: a preset, and fields that differ from it."""
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items()}
    return resolve(changes.pop("preset", PRESET)).updated(**changes)


def setting_of(asked: Mapping[str, Any], engine: Engine) -> Setting:
    """The setting of an engine; refuses, all reasons at once, what cannot be served."""
    config = config_of(asked)
    refusals = [f"{what}; {way_out}" for what, way_out in engine.obstacles]
    if not refusals:  # else the layers may be none of ours
        roles = schedule.roles(config, engine.full, 1 if config.schedule == "lookback" else 0)
        refusals = [*_of_config(config, engine), *_of_stages(roles, engine.stages)]
    if refusals:
        raise ValueError(
            f"visionpulse cannot serve this engine: {' | '.join(refusals)} "
            f'(or leave "{KEY}" out of the config)'
        )
    return Setting(config, engine, roles)


def _of_config(config: PulseConfig, engine: Engine) -> list[str]:
    found = []
    if config.schedule == "dense":
        found.append("schedule='dense' prunes nothing; serve a preset that does")
    if config.cache != "model":
        found.append(
            f"cache={config.cache!r}: the cache is the engine's; leave it out and set the engine's "
            "own dtype of it, such as --kv-cache-dtype"
        )
    if config.dense == "model" and engine.device == "cpu":
        found.append(
            "dense='model': the engine's CPU kernels cannot read the plain rows that decode rows "
            "need; leave out dense, or say dense='ours'"
        )
    if config.schedule == "lookback" and engine.has_drafts:
        found.append(
            "schedule='lookback' with speculative decoding: the tokens of one step run at once, so "
            "none can follow what the one before it kept; use schedule='paper' or 'per_layer'"
        )
    if engine.has_graphs and runs_between_stages(config):
        found.append(
            f"budget {config.budget!r} runs on the host between score and select, which a captured "
            "graph cannot; use dynamic, fixed, top_k or random, or run without graphs"
        )
    return found


def runs_between_stages(config: PulseConfig) -> bool:
    """Whether the budget is no part of the select kernel."""
    policy = budgets.policy_of(config.budget, config.ratio)
    if not isinstance(policy, budgets.Policy):
        return True
    return policy.clamp() is None and not isinstance(policy, budgets.TopK)


def _of_stages(roles: tuple[Role, ...], stages: tuple[tuple[int, int], ...]) -> list[str]:
    """A selection never leaves its stage, so each follower needs its anchor there."""
    if len(stages) < 2:
        return []
    found = []
    for number, (begin, end) in enumerate(stages):
        own = roles[begin:end]
        first = next((i for i, role in enumerate(own) if role is Role.FOLLOWER), None)
        if first is not None and Role.ANCHOR not in own[:first]:
            found.append(
                f"pipeline stage {number} (layers {begin} to {end - 1}): layer {begin + first} "
                "follows an anchor of another stage, and a selection does not cross stages; give "
                f"the stage its own: schedule='paper' with {begin + first} among the layers of "
                "anchor, or schedule='per_layer'"
            )
    return found


def of_request(wish: Any, setting: Setting) -> PulseConfig | None:
    """The config of a request that asks for its own budget; None where it opts out.

    A preset or a budget such as "top_k:64"; anchors and schedule stay those of the engine.
    """
    config = setting.config
    if wish is None or wish is True:
        return config
    if wish is False or wish == OFF:
        return None
    if setting.engine.device != "cpu":
        raise ValueError(
            f"a request's {KEY!r} must be {OFF!r} on a GPU, where all rows of a step share one "
            f"budget, got {wish!r}; leave it out, or serve that budget by an engine of its own"
        )
    presets = {name: preset for name, preset in PRESETS.items() if preset.schedule != "dense"}
    if isinstance(wish, str) and wish in presets:
        preset = presets[wish]
        return config.updated(tau=preset.tau, ratio=preset.ratio, budget=preset.budget)
    if isinstance(wish, str) and ":" in wish:
        own = config.updated(budget=wish)
        if not (setting.engine.has_graphs and runs_between_stages(own)):
            return own
    raise ValueError(
        f"a request's {KEY!r} must be {OFF!r}, a preset ({', '.join(presets)}) or a budget such "
        f'as "fixed:0.05" or "top_k:64", got {wish!r}'
    )
