"""The session of a patched model: made by `patch`, ended by `unpatch`."""

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..cache import MAX_QUERIES
from ..config import PulseConfig, config_data
from ..config import resolve as resolve_config
from ..trace.record import Trace, trace_of
from . import ragged, registry
from .attention import attention
from .draft_policy import FixedDraft
from .families import Anatomy, UnsupportedModelError, anatomy
from .float8_layers import holds_8_bits
from .hooks import Hooks
from .kv_layers import release
from .layer_roles import LayerRoles
from .lossless import AUTO, RunAhead, refuse
from .mode import Mode
from .patched_model import PatchedModel
from .stats import Recorder, Stats
from .tensor_parallel import head_group

_lock = threading.Lock()


class Session:
    """One patched model: its setting, its statistics, and the way back.

    As a context manager it unpatches at the end.
    """

    def __init__(
        self, anatomy: Anatomy, config: PulseConfig, record: bool, draft: int | str = 0
    ) -> None:
        self.anatomy = anatomy
        self.recorder = Recorder(record)
        roles, heads = LayerRoles.of(config, anatomy), head_group(anatomy.decoder)
        self.patched = PatchedModel(anatomy, roles, self.recorder, heads)
        self._config = config
        registry.enter(anatomy.decoder, attention)
        self._finalizer = weakref.finalize(anatomy.decoder, registry.leave, id(anatomy.config))
        self.patched.mode = Mode() if draft else None
        self._hooks = _SessionHooks(self)
        self._draft = draft
        self._ahead = RunAhead(self.patched, self.patched.mode, draft) if draft else None

    @property
    def config(self) -> PulseConfig:
        """The setting in force, as it was given."""
        return self._config

    @property
    def draft(self) -> int | str:
        """Tokens that a round of lossless decoding drafts, or "auto"; 0 without it."""
        return self._draft

    @property
    def round_seconds(self) -> list[tuple[float, float]]:
        """What the last rounds cost, of a fixed number of drafted tokens: drafts, and check."""
        policy = None if self._ahead is None else self._ahead.policy
        return list(policy.seconds) if isinstance(policy, FixedDraft) else []

    @property
    def anchors(self) -> tuple[int, ...]:
        """The layers that select."""
        return self.patched.layer_roles.anchors

    @property
    def stats(self) -> Stats:
        """What ran and was kept since the patch or the last `reset_stats`; summed up here."""
        self._hooks.dense.warn_held()
        return self.recorder.stats()

    @property
    def trace(self) -> Trace:
        """What each step kept; needs `patch(..., record=True)`."""
        if not self.recorder.record:
            raise ValueError(
                "this session records no trace; patch the model with record=True, "
                "or set session.record = True before generating"
            )
        config = self.anatomy.config
        about = {
            "model": getattr(self.anatomy.model.config, "name_or_path", "") or config.model_type,
            "config": config_data(self.patched.layer_roles.config),
            "anchors": list(self.anchors),
            "layers": len(self.anatomy.full),
        }
        return trace_of(self.recorder.entries, about)

    @property
    def record(self) -> bool:
        """Whether each step is recorded for `trace`."""
        return self.recorder.record

    @record.setter
    def record(self, on: bool) -> None:
        self.recorder.record = bool(on)

    def reset_stats(self) -> None:
        """Empty the statistics and the trace."""
        self.recorder.reset()

    @property
    def is_active(self) -> bool:
        """Whether the model is still patched by this session."""
        return self._finalizer.alive

    def update(self, **changes: Any) -> "Session":
        """Change settings; forwards that start after it follow them."""
        config = self._config.updated(**changes)
        if self._draft:
            _refuse_lossy(config)
        self.patched.set_roles(LayerRoles.of(config, self.anatomy))  # refuses before any change
        self._config = config
        return self

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """Generate as `model.generate` does; a batch runs ahead too, each row by counts of its own.

        Needs `patch(..., lossless=True)`. The tokens are those of the dense model, greedy or drawn
        under one seed. Beams, assistants, filled caches, and processors and criteria of your own
        are left to `model.generate`, and said once.
        """
        if self._ahead is None:
            raise ValueError(
                "session.generate(...) decodes losslessly, and this session was made without "
                "lossless=True; use model.generate(...), or patch with lossless=True"
            )
        return ragged.generate(self._ahead, inputs, options)

    def set_visual_mask(self, mask: Tensor) -> None:
        """Set which tokens of this thread's next prefill are visual: bool [B, tokens].

        Needed only where the caller merges pictures into `inputs_embeds`.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            raise TypeError("the visual mask must be a bool tensor [B, tokens of the next forward]")
        self._hooks.positions.user_mask = mask

    @contextmanager
    def paused(self) -> Iterator["Session"]:
        """Run the model as it was: the dense baseline on the same object."""
        before, self.patched.is_paused = self.patched.is_paused, True
        try:
            yield self
        finally:
            self.patched.is_paused = before

    def unpatch(self) -> None:
        """Leave the model exactly as it was."""
        with _lock:
            if not self._finalizer.alive:
                warnings.warn("this session has ended: the model is not patched", stacklevel=2)
                return
            self._hooks.dense.warn_held()
            self._hooks.remove()
            if self._ahead is not None:
                self._ahead.remove()
            self._finalizer()
            # generate() keeps a static cache on the model for its next call
            kept = getattr(self.anatomy.model, "_cache", None)
            if holds_8_bits(kept):
                del self.anatomy.model._cache  # it makes another one
            else:
                release(kept)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_active:
            self.unpatch()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        raise TypeError("a patched model cannot be copied; unpatch it first, patch both after")

    def __reduce__(self) -> str:
        raise TypeError("a patched model cannot be pickled; unpatch it first, or save_pretrained")

    def __repr__(self) -> str:
        state = "active" if self.is_active else "ended"
        kind = type(self.anatomy.model).__name__
        return f"<Session on {kind}, anchors {self.anchors}, {state}; {self.config}>"


class _SessionHooks(Hooks):
    """The hooks by which a decoder keeps its session alive, and leads back to it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        super().__init__(session.patched)


def session_of(model: Any) -> Session | None:
    """The session of a patched model, or None."""
    try:
        decoder = anatomy(model).decoder
    except UnsupportedModelError:
        return None
    return _session_on(decoder)


def _session_on(decoder: Any) -> Session | None:
    for hook in decoder._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _SessionHooks):
            return owner.session
    return None


def patch(
    model: Any,
    config: PulseConfig | str = "10pct",
    *,
    record: bool = False,
    lossless: bool = False,
    draft: int | str = "auto",
    **changes: Any,
) -> Session:
    """Make single-token decode steps of a model of transformers sparse in its visual tokens.

    `config` is a PulseConfig, the name of a preset, or a .json file of `visionpulse calibrate`;
    keywords change fields of it. The model keeps its `generate()`, its prefill and its training.
    With `lossless=True` the tokens are the dense model's: sparse steps draft some, and one dense
    forward checks them, for one row on a dynamic or static cache, or for a batch on a dynamic one
    in `session.generate(...)`; others decode dense. What differs is the rounding of a forward
    of several tokens. `draft` is how many, 1 to 15; "auto" takes what pays on this model and
    machine, also which schedule drafts unless the setting names one, and decodes dense where
    nothing pays.
    Patching twice with the same setting returns the same session; as a context manager the session
    unpatches at the end.
    """
    config = resolve_config(config)
    config = config.updated(**changes) if changes else config
    with _lock:
        parts = anatomy(model)
        drafted = _draft_of(lossless, draft, record)
        if drafted and config.schedule == "dense":
            raise ValueError(
                "lossless=True with schedule='dense' has nothing to draft with; patch without "
                "lossless=True, which is exact too, or with a preset that prunes"
            )
        if drafted:
            _refuse_lossy(config)
            refuse(parts)
        session = _session_on(parts.decoder)
        if session is None:
            return Session(parts, config, record, drafted)  # refuses before any change
        if session.draft != drafted:
            raise ValueError(
                f"the model is patched with draft={session.draft} (0 is not lossless), "
                f"got {drafted}; unpatch it first"
            )
        if session.config != config:
            raise ValueError(
                f"the model is patched with {session.config}, got {config}; "
                "use session.update(...), or unpatch it first"
            )
        session.recorder.record = session.recorder.record or record
        return session


def _refuse_lossy(config: PulseConfig) -> None:
    """Refuse what would change the dense model's tokens, in a lossless model."""
    if config.cache == "fp8":
        raise ValueError(
            "lossless=True gives the tokens of the unpatched model, and a cache of 8 bits changes "
            "them; patch without lossless=True, or leave cache='fp8' out"
        )


def _draft_of(lossless: bool, draft: int | str, record: bool) -> int | str:
    """Tokens that a round drafts, checked; 0 where decoding is not lossless."""
    if not lossless:
        return 0
    is_number = isinstance(draft, int) and not isinstance(draft, bool)
    if draft != AUTO and not (is_number and 1 <= int(draft) < MAX_QUERIES):
        raise ValueError(
            f'draft must be "auto" or a number of tokens from 1 to {MAX_QUERIES - 1}, '
            f"got {draft!r}; a round checks them and one more"
        )
    if record:
        raise ValueError(
            "record=True with lossless=True: drafted steps may be rejected, so a trace would tell "
            "of tokens that are not in the answer; record without lossless=True"
        )
    return draft


def set_visual_mask(model: Any, mask: Tensor) -> None:
    """Set which tokens of the next prefill are visual: bool [B, tokens]; see Session."""
    session = session_of(model)
    if session is None:
        raise ValueError("the model is not patched; patch it first")
    session.set_visual_mask(mask)


def unpatch(model: Any) -> None:
    """End the session of a model; warns where there is none."""
    session = session_of(model)
    if session is None:
        warnings.warn("the model is not patched", stacklevel=2)
        return
    session.unpatch()
