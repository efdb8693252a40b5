"""What a user may set: `PulseConfig`, its presets, and the names that registries add to."""

import sys
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from os import PathLike
from typing import Any

from . import budgets
from .files import one_line, read_json

MASSES = ("max", "mean")
SCORES = ("prob", "logit", "prob_tau")
ANCHOR_OUTPUTS = ("pruned", "dense")
SCHEDULES = ("paper", "lookback", "per_layer", "dense")
DENSE = ("ours", "model")
QUERIES = ("dense", "sparse")
CACHES = ("model", "fp8")

# The registry of backends adds its names here: a config may carry them without importing one.
BACKENDS: list[str] = ["auto"]


@dataclass(frozen=True)
class PulseConfig:
    """Settings of the method; frozen, checked when made, hashable.

    `tau` is the temperature of the mass statistic, `ratio` the clamp on the retention ratio,
    `anchor` a 0-based layer, several of them in ascending order, or None for the default. `budget`
    is a policy or its name: "dynamic", "fixed:0.05", "top_k:64", "top_p:0.9", "random:7".
    `queries`: whether a forward with 2 to 16 tokens behind a cache, as speculative decoding makes
    them, is dense, or as sparse as if its tokens had come one by one. `cache`: a patched model's
    keys and values are stored in the dtype of the "model", or in 8 bits, "fp8". Functional ops
    ignore `anchor`, `schedule`, `refresh`, `dense`, `queries` and `cache`.
    """

    anchor: int | tuple[int, ...] | None = None
    tau: float = 0.4
    ratio: tuple[float, float] = (0.05, 0.10)
    mass: str = "max"
    score: str = "prob"
    anchor_output: str = "pruned"
    budget: budgets.Budget = "dynamic"
    schedule: str = "paper"
    refresh: int = 8
    dense: str = "ours"
    queries: str = "dense"
    cache: str = "model"
    backend: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", budgets.named(self.budget))
        object.__setattr__(self, "ratio", _ratio(self.ratio))
        object.__setattr__(self, "anchor", _anchor(self.anchor))
        object.__setattr__(self, "tau", _positive("tau", self.tau))
        _one_of("mass", self.mass, MASSES)
        _one_of("score", self.score, SCORES)
        _one_of("anchor_output", self.anchor_output, ANCHOR_OUTPUTS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("dense", self.dense, DENSE)
        _one_of("queries", self.queries, QUERIES)
        _one_of("cache", self.cache, CACHES)
        _one_of("backend", self.backend, BACKENDS)
        _budget(self.budget, self.score)
        if not _is_int(self.refresh) or self.refresh < 0:
            raise ValueError(
                f"refresh must be a number of steps >= 0, got {self.refresh!r}; 0 never refreshes"
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.schedule == "per_layer":
            if self.anchor is not None:
                raise ValueError(
                    f"schedule='per_layer' makes every layer an anchor, got {self.anchor!r}; "
                    "leave anchor=None or use schedule='paper'"
                )
            if self.anchor_output == "dense":
                raise ValueError(
                    "schedule='per_layer' with anchor_output='dense' would prune nothing; "
                    "use anchor_output='pruned'"
                )
        if self.schedule == "dense" and self.anchor is not None:
            raise ValueError(
                f"schedule='dense' selects nothing, so it has no anchor, got {self.anchor!r}; "
                "leave anchor=None or use schedule='paper'"
            )
        if self.schedule == "dense" and self.dense == "model":
            raise ValueError(
                "schedule='dense' with dense='model' would be the unpatched model; leave out dense"
            )
        if self.cache == "fp8" and self.dense == "model":
            raise ValueError(
                "cache='fp8' with dense='model': the model's own attention cannot read 8 bits, so "
                "each dense layer would be copied in every step; leave out dense"
            )
        if self.schedule == "lookback" and self.queries == "sparse":
            raise ValueError(
                "queries='sparse' with schedule='lookback': the early layers of a query follow the "
                "selection of the query before it, which the same forward has yet to make; "
                "use schedule='paper', or queries='dense'"
            )
        if self.schedule == "lookback" and isinstance(self.anchor, tuple):
            raise ValueError(
                f"schedule='lookback' takes one anchor, got {self.anchor!r}; "
                "pass one layer, or schedule='paper' for several"
            )

    def k_max(self, n_visual: int) -> int:
        """The most visual tokens that a row of `n_visual` can keep: the width of its list."""
        bound: int = budgets.policy_of(self.budget, self.ratio).bound(n_visual)
        return bound

    def updated(self, **changes: Any) -> "PulseConfig":
        """Give a copy with some fields changed, checked again."""
        known = [field.name for field in fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ValueError(
                f"PulseConfig has no field {', '.join(map(repr, unknown))}; "
                f"known: {', '.join(known)}"
            )
        return replace(self, **changes)


def resolve(config: "PulseConfig | str") -> PulseConfig:
    """Turn a preset name, or a file of `visionpulse calibrate`, into its config.

    A config passes through. A name that ends in .json is a file, read in every call.
    """
    if isinstance(config, PulseConfig):
        return config
    if not isinstance(config, str):
        raise TypeError(
            f"config must be a PulseConfig or the name of a preset, got {type(config).__name__}"
        )
    if config.endswith(".json"):
        return load_config(config)
    if config not in PRESETS:
        raise ValueError(
            f"no preset {config!r}; known: {', '.join(map(repr, PRESETS))}; "
            "or pass a visionpulse.PulseConfig, or a .json file of `visionpulse calibrate`"
        )
    return PRESETS[config]


def load_config(path: str | PathLike[str]) -> PulseConfig:
    """Read the setting in a file that `visionpulse calibrate` wrote."""
    found = read_json(path, f"`visionpulse calibrate MODEL --data FILE --out {path}` writes one")
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise ValueError(f"{path} holds no config; expected what `visionpulse calibrate` writes")
    try:
        return PulseConfig().updated(**found["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def config_data(config: PulseConfig) -> dict[str, Any]:
    """The fields as JSON holds them, numbers as numbers; `load_config` takes them back."""
    data = {field.name: getattr(config, field.name) for field in fields(config)}
    return data | {"budget": budgets.name_of(config.budget)}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(field: str, value: object, known: "tuple[str, ...] | list[str]") -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a name, got {type(value).__name__}; known: {known}")
    if value not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"unknown {field} {value!r}; known: {names}")


def _positive(field: str, value: Any) -> float:
    if not _is_number(value):
        raise TypeError(f"{field} must be a number, got {type(value).__name__}")
    if not 0 < value <= sys.float_info.max:  # false for NaN as well
        raise ValueError(
            f"{field} must be finite and > 0, got {value!r}; the presets use 0.1 and 0.4"
        )
    return float(value)


def _ratio(value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(map(_is_number, value)):
        raise TypeError(f"ratio must be a pair (r_min, r_max) of numbers, got {value!r}")
    low, high = value
    if not 0 <= low <= high <= 1:  # false for NaN as well
        raise ValueError(
            f"ratio must hold 0 <= r_min <= r_max <= 1, got ({low}, {high}); "
            "the smaller bound comes first"
        )
    return float(low), float(high)


def _anchor(value: Any) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    layers = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not layers or not all(_is_int(layer) for layer in layers):
        raise TypeError(f"anchor must be a layer number, several of them, or None, got {value!r}")
    if layers[0] < 0 or any(b <= a for a, b in pairwise(layers)):
        raise ValueError(f"anchor layers must be >= 0 and strictly ascending, got {value!r}")
    return layers if len(layers) > 1 else layers[0]


def _budget(value: budgets.Budget, score: str) -> None:
    if isinstance(value, str):
        _one_of("budget", value, list(budgets.REGISTRY))
        value = budgets.REGISTRY[value]()
    elif not (callable(getattr(value, "bound", None)) and callable(getattr(value, "counts", None))):
        raise TypeError(
            "budget must be a registered name or a policy with bound(n_visual) and "
            f"counts(mass, n_visual, scores), got {type(value).__name__}; known names: "
            f"{', '.join(map(repr, budgets.REGISTRY))}"
        )
    needs = getattr(value, "needs_score", None)
    if needs is not None and score not in needs:
        raise ValueError(
            f"budget {value!r} needs score to be one of {needs}, got {score!r}; "
            "it sums probabilities"
        )


# tau and both bounds belong together: a preset sets all three. "dense" prunes nothing: our dense
# kernels alone.
PRESETS: dict[str, PulseConfig] = {
    "10pct": PulseConfig(tau=0.4, ratio=(0.05, 0.10)),
    "5pct": PulseConfig(tau=0.1, ratio=(0.01, 0.05)),
    "dense": PulseConfig(ratio=(1.0, 1.0), schedule="dense"),
}
