"""The backends: one base class, one registry, and the choice between them.

A backend computes the three stages of the contract for tensors that were checked by the caller.
To add one, write `backends/<name>.py` and add its line to `_CLASSES`, at its place in the order
that `auto` tries.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from .. import config as _config
from ..cache import Cache
from ..call import Params
from ..selection import Selection
from ..visual import VisualTokens
from ..workspace import Workspace

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

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        raise NotImplementedError

    def refuses(
        self, q: Tensor, kv: Cache, visual: VisualTokens | None, params: Params
    ) -> str | None:
        """Why it does not serve these tensors, or None; looks at host data only."""
        raise NotImplementedError

    def refuses_select(self, scores: Tensor, params: Params) -> str | None:
        """Why it does not select from these scores, or None."""
        raise NotImplementedError

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        """Whether it rounds the weights of V to `dtype`, as tensor cores need; else float32."""
        return False

    def score(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens,
        params: Params,
        *,
        scores: Tensor,
        out: Tensor | None,
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor]:
        """Fill `scores` [B, N], and `out` with dense attention if given; give both masses [B]."""
        raise NotImplementedError

    def select(
        self,
        scores: Tensor,
        mass: Tensor,
        mass_mean: Tensor,
        visual: VisualTokens,
        params: Params,
        *,
        starts: Tensor | None,
        lengths: Tensor | None,
        workspace: Workspace,
    ) -> Selection:
        """Turn scores and masses into the kept positions."""
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens | None,
        selection: Selection | None,
        params: Params,
        *,
        out: Tensor,
        workspace: Workspace,
    ) -> Tensor:
        """Attend to text and selected keys, or to all keys without a selection."""
        raise NotImplementedError

    def decode(
        self,
        q: Tensor,
        kv: Cache,
        visual: VisualTokens,
        params: Params,
        *,
        scores: Tensor | None,
        out: Tensor,
        workspace: Workspace,
    ) -> Selection:
        """Join the three stages; a backend may override this with fewer passes."""
        if scores is None:
            scores = q.new_empty((kv.batch, kv.capacity), dtype=mass_dtype(q))
        dense = out if params.anchor_output == "dense" else None
        mass, mass_mean = self.score(
            q, kv, visual, params, scores=scores, out=dense, workspace=workspace
        )
        selection = self.select(
            scores,
            mass,
            mass_mean,
            visual,
            params,
            starts=kv.starts,
            lengths=kv.lengths,
            workspace=workspace,
        )
        if dense is None:
            self.attend(q, kv, visual, selection, params, out=out, workspace=workspace)
        return selection


def mass_dtype(like: Tensor) -> torch.dtype:
    """The dtype of scores and masses: float32, but float64 for float64 inputs."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


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


def backends() -> dict[str, str]:
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


def resolve(name: str, device: torch.device, against: Against) -> Backend:
    """The backend for a call: a name is obeyed or refused, "auto" takes the first that serves.

    `against(backend)` gives what stands against a backend that can run here, or None.
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
    for candidate in _CLASSES:
        backend = get(candidate)
        if backend.auto_devices is not None and device.type not in backend.auto_devices:
            continue
        if not (backend.unavailable() or against(backend)):
            return backend
    raise BackendUnavailableError(f"no backend serves this call:\n{choice(name, device, against)}")


def choice(name: str, device: torch.device, against: Against) -> Choice:
    """Explain `resolve`: which backend it gives, and why not the others."""
    name = _wanted(name)
    chosen, reasons = None, {}
    for candidate in _CLASSES:
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
        reasons[candidate] = reason or "serves this call"
    return Choice(chosen, reasons)
