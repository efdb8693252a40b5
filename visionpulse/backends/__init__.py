"""The backends: one base class, one registry, and the choice between them.

A backend computes the three stages of the contract for tensors that were checked by the caller.
To add one, write `backends/<name>.py` and add its line to `_CLASSES`, at its place in the order
that `auto` tries.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from .. import config as _config
from ..call import Call, Scored
from ..float8 import FLOAT8
from ..selection import Selection

_CLASSES = {
    "cuda": "CudaBackend",
    "triton": "TritonBackend",
    "cpu": "CpuBackend",
    "reference": "ReferenceBackend",
}
_config.BACKENDS.extend(_CLASSES)

ENVIRONMENT = "VISIONPULSE_BACKEND"  # replaces "auto" only


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot run here, or not on these tensors."""


class Backend:
    """One implementation of score, select and attend."""

    name: ClassVar[str]
    # Types of device that `auto` takes this backend for; None is any.
    auto_devices: ClassVar[tuple[str, ...] | None] = None
    # Queries of one row that its kernels take; more are handed to it as rows of their own.
    max_queries: ClassVar[int] = 1
    # Whether its kernels read a cache of float8_e4m3fn.
    reads_float8: ClassVar[bool] = False

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        return None

    def against(self, call: Call) -> str | None:
        """What stands against serving this call here, or None."""
        reason = self.refuses(call)
        if reason is None and call.kv.dtype == FLOAT8 and not self.reads_float8:
            return "its kernels do not read a cache of float8_e4m3fn yet"
        return reason

    def refuses(self, call: Call) -> str | None:
        """Why it does not serve these tensors, or None; looks at host data only."""
        return None

    def refuses_select(self, scored: Scored) -> str | None:
        """Why it does not select from these scores, or None."""
        return None

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        """Whether it rounds the weights of V to `dtype`, as tensor cores need; else float32."""
        return False

    def score(self, call: Call) -> tuple[Scored, Tensor | None]:
        """Scores and masses; also dense attention, if the anchor's output is dense."""
        raise NotImplementedError

    def select(self, scored: Scored) -> Selection:
        """Turn scores and masses into the kept positions."""
        raise NotImplementedError

    def attend(self, call: Call) -> Tensor:
        """Attend to text and selected keys, or to all keys without a selection."""
        raise NotImplementedError

    def decode(self, call: Call) -> tuple[Tensor, Selection]:
        """Output and selection of an anchor; a backend may override this with fewer passes."""
        return self.staged(call)

    def staged(
        self, call: Call, between: Callable[[Scored], Scored] | None = None
    ) -> tuple[Tensor, Selection]:
        """Run the stages one by one; `between` may change what select takes."""
        scored, out = self.score(call)
        selection = self.select(scored if between is None else between(scored))
        if out is None:
            out = self.attend(call._replace(selection=selection))
        return out, selection


@cache
def get(name: str) -> Backend:
    """The one instance of a backend."""
    if name not in _CLASSES:
        known = ", ".join(map(repr, ("auto", *_CLASSES)))
        raise ValueError(f"unknown backend {name!r}; known: {known}")
    module = importlib.import_module(f".{name}", __name__)
    return getattr(module, _CLASSES[name])()  # type: ignore[no-any-return]


def names() -> tuple[str, ...]:
    """The registered backends, in the order that `auto` tries."""
    return tuple(_CLASSES)


def states() -> dict[str, str]:
    """Each backend with "available", or the reason why it cannot run on this machine."""
    return {name: get(name).unavailable() or "available" for name in _CLASSES}


Against: TypeAlias = Callable[[Backend], str | None]


@dataclass(frozen=True)
class Choice:
    """Which backend serves a call, and what stood against each of the others."""

    name: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        rows = (
            f"{'->' if name == self.name else '  '} {name:<10} {reason}"
            for name, reason in self.reasons.items()
        )
        return "\n".join(rows)


def _wanted(name: str) -> str:
    if name == "auto":
        return os.environ.get(ENVIRONMENT) or "auto"
    return name


def _order(queries: int | None) -> list[str]:
    """What `auto` tries in turn: first the backends whose kernels take all queries of a row.

    Elsewhere each query costs a pass of its own, so only the reference, of no speed, comes later.
    """
    needed = queries or 1
    return sorted(_CLASSES, key=lambda n: (n == "reference", get(n).max_queries < needed))


def resolve(
    name: str, device: torch.device, against: Against, queries: int | None = None
) -> Backend:
    """The backend for a call: a name is obeyed or refused, "auto" takes the first that serves.

    `against(backend)` gives what stands against a backend that can run here, or None. A backend
    whose `max_queries` are fewer than `queries` serves them as rows: see `by_query.fitted`.
    """
    name = _wanted(name)
    if name != "auto":
        backend = get(name)
        reason = backend.unavailable() or against(backend)
        if reason:
            raise BackendUnavailableError(
                f"backend {name!r} was asked for but cannot serve this call: {reason}; "
                "backend='auto' takes one that can"
            )
        return backend
    for candidate in _order(queries):
        backend = get(candidate)
        if backend.auto_devices is not None and device.type not in backend.auto_devices:
            continue
        if not (backend.unavailable() or against(backend)):
            if candidate == "reference" and device.type == "cpu":
                _say_slow(get("cpu").unavailable())
            return backend
    raise BackendUnavailableError(
        f"no backend serves this call:\n{choice(name, device, against, queries)}"
    )


@cache
def _say_slow(reason: str | None) -> None:
    """Warn once that the reference serves where no kernels could be loaded."""
    if reason is not None:
        warnings.warn(f"visionpulse is slow, by its reference: {reason}", stacklevel=4)


def choice(name: str, device: torch.device, against: Against, queries: int | None = None) -> Choice:
    """Explain `resolve`: which backend it gives, and why not the others."""
    name = _wanted(name)
    chosen, reasons = None, {}
    for candidate in _order(queries):
        backend = get(candidate)
        devices = backend.auto_devices
        passed_over = ""
        if name != "auto":
            passed_over = "" if candidate == name else f"{name!r} was asked for"
        elif devices is not None and device.type not in devices:
            passed_over = f"'auto' takes it on {' and '.join(devices)} only"
        elif chosen is not None:
            passed_over = f"'auto' prefers {chosen!r}"
        reason = backend.unavailable() or against(backend) or passed_over
        if not reason:
            chosen = candidate
        serves = "serves this call"
        if backend.max_queries < (queries or 1):
            serves += f", its {queries} queries of a row one by one: K and V are read for each"
        reasons[candidate] = reason or serves
    return Choice(chosen, reasons)


class _Package(ModuleType):
    """`visionpulse.backends` is this package, and `visionpulse.backends()` the states."""

    def __call__(self) -> dict[str, str]:
        return states()


sys.modules[__name__].__class__ = _Package
