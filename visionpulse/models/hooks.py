"""The hooks on a patched model: find the visual positions, give each decode step its context.

The base model sees the token ids, its decoder sees the cache. What the first finds waits in
thread-local storage for the second, which follows in the same thread within the same forward.
"""

import re
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import registry
from .arguments import Arguments, cache_of_output
from .attention import CONTEXT
from .cache import attach, has_layers, state_of, swap_layers
from .dense_steps import DenseSteps
from .families import attention_layers
from .notices import DenseReason
from .state import CacheState, visual_of
from .step import Step, visible_keys

if TYPE_CHECKING:
    from .session import Session

# Keywords that carry a picture into a forward; sizes and masks that go with it do not count.
_FEATURES = re.compile(
    r"pixel_values|mm_encoder_outputs|(image|video)_(embeds|features|hidden_states|patches)"
    r"|images$|videos$"
)


class _Waiting(threading.local):
    found: Tensor | None = None  # bool [B, Q], the visual tokens of the forward under way
    given: Tensor | None = None  # bool [B, Q], set by the user for the next prefill
    was_given = False  # the prefill under way has such a mask
    has_features = False
    is_embedded = False  # found by comparing embeddings, which merged pictures do not equal
    is_known = False  # the base model has seen this forward
    token: Tensor | None = None
    state: CacheState | None = None  # of a cache that the decoder makes itself
    picture: bool | None = None  # whether one came with the last prefill; None: none was seen
    awaits_decoder = False  # the base model runs a decode step, the decoder has not begun
    is_inside = False  # the decoder runs
    base_ran = False


class Hooks:
    """The four hooks of one session."""

    def __init__(self, session: "Session") -> None:
        self.session = session
        anatomy = session.anatomy
        self._base = Arguments(anatomy.base)
        self._decoder = Arguments(anatomy.decoder)
        self._layer = anatomy.first_full
        self._waiting = _Waiting()
        self.dense = DenseSteps(anatomy, session.recorder, session.notices)
        self._watched = attention_layers(anatomy.decoder)[0]
        # a prefill reads the device; disabled here, not by decorators, which would import dynamo
        eager: Callable[..., Any] = torch.compiler.disable
        self._find = eager(self._find_visual)
        self._prefill = eager(self._take_prefill)
        self._handles = [
            anatomy.base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            anatomy.base.register_forward_hook(self._after_base, always_call=True),
            anatomy.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            anatomy.decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        if anatomy.model is not anatomy.base:
            self._model = Arguments(anatomy.model)
            after = anatomy.model.register_forward_hook(self._after_model, with_kwargs=True)
            self._handles.append(after)
        passed_by = weakref.WeakMethod(self._layer_passed_by)
        registry.watch(self._watched, lambda: _call(passed_by))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        registry.watch(self._watched, None)

    def _before_base(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        session = self.session
        if not torch.compiler.is_compiling():
            self._waiting.base_ran = True
        if session.is_paused:
            if not torch.compiler.is_compiling():
                self._waiting.picture = None
            return
        ids = self._base.get("input_ids", args, kwargs)
        if ids is not None and ids.shape[1] == 1:
            if not torch.compiler.is_compiling():
                self._waiting.awaits_decoder = True
            if session.recorder.record:
                self._waiting.token = ids
            return
        self._find(ids, args, kwargs)

    def _find_visual(
        self, ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Mark the visual tokens of a prefill."""
        self.dense.flush()
        waiting, wanted = self._waiting, self.session.anatomy.visual_ids
        waiting.is_known, waiting.is_embedded = True, False
        waiting.has_features = waiting.picture = _has_features(kwargs)
        if ids is not None:
            waiting.found = torch.isin(ids, torch.tensor(wanted, device=ids.device))
            return
        embeds = self._base.get("inputs_embeds", args, kwargs)
        kinds = kwargs.get("mm_token_type_ids")
        if embeds is None or embeds.shape[1] == 1:
            waiting.found = None
        elif kinds is not None:
            kinds = kinds[:, -embeds.shape[1] :]
            waiting.found = (kinds == 1) | (kinds == 2)  # 1 is an image, 2 a video
        else:
            waiting.found, waiting.is_embedded = self._placeholders(embeds), True

    def _placeholders(self, embeds: Tensor) -> Tensor:
        """Positions [B, Q] whose embedding is that of a visual token."""
        embed = self.session.anatomy.model.get_input_embeddings()
        wanted = torch.tensor(self.session.anatomy.visual_ids, device=embeds.device)
        rows = embed(wanted).to(embeds)  # [ids, width]
        same: Tensor = embeds[:, :, None] == rows
        return same.all(-1).any(-1)

    def _after_base(self, module: nn.Module, args: Any, output: Any) -> None:
        """Leave nothing behind, also when the forward failed between the two hooks."""
        if torch.compiler.is_compiling():
            return
        waiting = self._waiting
        if waiting.awaits_decoder:
            waiting.awaits_decoder = False
            if output is not None and not self.session.is_paused:  # None: the forward failed
                self.dense.add(DenseReason.DECODER, waiting.picture is True)
        if waiting.is_known or waiting.token is not None:
            waiting.found, waiting.is_known, waiting.token = None, False, None
            waiting.state = None

    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        session = self.session
        is_eager = not torch.compiler.is_compiling()
        if is_eager:
            self._waiting.awaits_decoder, self._waiting.is_inside = False, True
        inputs = self._decoder.get("inputs_embeds", args, kwargs)
        if inputs is None:
            inputs = self._decoder.get("input_ids", args, kwargs)
        if session.is_paused or module.training:
            if is_eager and inputs is not None and inputs.shape[1] == 1:
                reason = DenseReason.PAUSED if session.is_paused else DenseReason.TRAINING
                self.dense.add(reason, self._waiting.picture is True)
            return None
        if inputs is None:
            raise TypeError(
                f"{type(module).__name__} was called with neither input_ids nor inputs_embeds, "
                "so no token is known; unpatch the model, or pause the session for this call"
            )
        cache = self._decoder.cache(args, kwargs)
        if inputs.shape[1] == 1:
            state = None if cache is None else state_of(cache, self._layer)
            if state is not None:
                if not state.model_path:
                    return args, {**kwargs, CONTEXT: self._step(state)}
                if not is_eager:
                    self.dense.add_compiled(DenseReason.HOLES, inputs.device)
                else:
                    self.dense.add(DenseReason.HOLES, state.has_picture)
                return None
        mask = self._decoder.get("attention_mask", args, kwargs)
        self._prefill(cache, inputs, mask)
        return None

    def _step(self, state: CacheState) -> Step:
        session = self.session
        token = self._waiting.token if session.recorder.record else None
        step = Step(session.plan, state, session.layers, session.recorder, session.heads, token)
        if not step.compiled:
            state.steps += 1
        return step

    def _take_prefill(self, cache: Any, inputs: Tensor, mask: Any) -> None:
        """Bring the state of the cache up to the tokens of this forward."""
        session, waiting = self.session, self._waiting
        found = self._found(inputs)
        if cache is not None and not has_layers(cache):
            if inputs.shape[1] == 1:
                might = waiting.picture is not False
                self.dense.add(DenseReason.CACHE_KIND, might, type(cache).__name__)
            return
        is_new = True
        past, limit, state = 0, -1, None
        if cache is not None:
            swap_layers(cache, len(session.anatomy.full))
            session.notices.cache(cache)
            state = state_of(cache, self._layer)
            past = int(cache.get_seq_length(self._layer)) if len(cache.layers) else 0
            limit = _static_length(cache, self._layer)
            is_new = state is None
        state = session.new_state() if state is None else state
        total = past + inputs.shape[1]
        state.model_path, state.needs_mask = _has_holes(mask, total), limit > 0
        state.capacity = limit if limit > 0 else None
        self._see(state, inputs, found, past, limit)
        self._blind(state, inputs, past if is_new else 0, limit)
        self.dense.last_had_picture = state.has_picture
        if limit > 0 and session.plan.looks_back:
            state.look_back(getattr(cache.layers[self._layer], "spare", None))
        session.recorder.prepare(inputs.device)
        if cache is None:
            waiting.state = state
        else:
            attach(cache, self._layer, state)

    def _blind(self, state: CacheState, inputs: Tensor, unseen: int, limit: int) -> None:
        """Say why the pictures of a prefill are unknown, `unseen` tokens lying before it."""
        waiting, is_step = self._waiting, inputs.shape[1] == 1
        if state.has_picture:
            state.blind = None
        elif unseen:
            state.blind = None if waiting.picture is False else DenseReason.CACHE_UNSEEN
        elif waiting.is_known and waiting.has_features:
            state.blind = DenseReason.POSITIONS
        elif not waiting.is_known and not waiting.was_given and not is_step:
            state.blind = DenseReason.PROMPT_UNSEEN
        if is_step and state.blind is not None:
            self.dense.add(state.blind, True)
        elif is_step and unseen:
            self.dense.add(DenseReason.TEXT, False)
        elif limit > 0 and state.blind is not None:
            self.dense.warn(state.blind)  # compiled steps, of a static cache, cannot

    def give(self, mask: Tensor) -> None:
        """Take the visual positions of this thread's next prefill from the user."""
        self._waiting.given = mask

    def _found(self, inputs: Tensor) -> Tensor | None:
        """The visual positions of a prefill: what the user gave, else what the base model saw."""
        waiting = self._waiting
        rows, width = inputs.shape[:2]
        waiting.was_given = waiting.given is not None
        if waiting.given is not None:
            given, waiting.given = waiting.given, None
            if given.shape[1] != width or rows % given.shape[0]:
                raise ValueError(
                    f"set_visual_mask got {tuple(given.shape)}, this prefill is [{rows}, {width}]; "
                    "give one bool per token of the next forward"
                )
            waiting.has_features = waiting.picture = bool(given.any())
            given = given.to(inputs.device)
            return given.repeat_interleave(rows // given.shape[0], 0)  # beams repeat rows
        found = waiting.found if waiting.is_known else None
        # another shape: the base model was stopped halfway, and this is another forward
        return found if found is not None and found.shape == inputs.shape[:2] else None

    def _see(
        self, state: CacheState, inputs: Tensor, found: Tensor | None, past: int, limit: int
    ) -> None:
        """Add what was found in `inputs` [B, Q, ...] to the visual set, behind `past` tokens."""
        has_features = self._waiting.has_features
        if past and not has_features:
            found = None  # a generated placeholder, or a text turn: nothing new is visual
        visual = state.visual if past else None
        if found is None and visual is not None and visual.size <= max(past, limit):
            state.restart()
            return
        if found is None and visual is None and limit < 0:
            state.see(None)
            return
        rows, total = inputs.shape[0], past + inputs.shape[1]
        mask = torch.zeros(rows, max(total, limit), dtype=torch.bool, device=inputs.device)
        if visual is not None:
            mask[:, :past] = visual.mask(past)
        if found is not None:
            mask[:, past:total] = found
        # one shape for every prompt of a static cache, so that they share a compiled graph
        state.see(visual_of(mask, state.capacity))
        if found is not None and not has_features:
            self.session.notices.prompt(state.visual, self._waiting.is_embedded)

    def _after_decoder(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Account for a step without a selection; attach the state to a cache of the decoder."""
        step = kwargs.get(CONTEXT)
        if step is not None and step.is_first:
            self._without_selection(step, output)
        if not torch.compiler.is_compiling():
            self._waiting.is_inside = False
        if torch.compiler.is_compiling() or self._waiting.state is None:
            return
        state, self._waiting.state = self._waiting.state, None
        cache = cache_of_output(output)
        if cache is not None:
            attach(cache, self._layer, state)

    def _after_model(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Notice a forward of the whole model that went past its base model."""
        if torch.compiler.is_compiling() or self.session.is_paused:
            return
        waiting = self._waiting
        ran, waiting.base_ran = waiting.base_ran, False
        if ran:
            return
        inputs = self._model.get("input_ids", args, kwargs)
        if inputs is not None and inputs.shape[1] == 1:
            self.dense.add(DenseReason.DECODER, waiting.picture is True)
        else:
            waiting.picture = _has_features(kwargs)

    def _layer_passed_by(self) -> None:
        """Notice a decode step in a layer, outside the decoder."""
        waiting = self._waiting
        if not (waiting.is_inside or self.session.is_paused):
            self.dense.add(DenseReason.DECODER, waiting.picture is not False)

    def _without_selection(self, step: Step, output: Any) -> None:
        """Find out why no anchor selected in a step."""
        detail = ""
        if step.state.visual is None:
            reason = step.state.blind or DenseReason.TEXT
        elif self.session.anatomy.dense_because:
            reason = DenseReason.DESIGN
        elif step.refused is not None:
            reason, detail = DenseReason.INPUTS, step.refused
        else:
            reason = DenseReason.ATTENTION
        if step.compiled:
            self.dense.add_compiled(reason, self._device_of(output), detail)
        else:
            has_picture = step.state.has_picture or step.state.blind is not None
            self.dense.add(reason, has_picture, detail)

    @staticmethod
    def _device_of(output: Any) -> torch.device:
        hidden: Tensor = output[0]
        return hidden.device


def _call(method: "weakref.WeakMethod[Callable[[], None]]") -> None:
    found = method()
    if found is not None:
        found()


def _has_features(kwargs: dict[str, Any]) -> bool:
    """Whether a forward is given pictures."""
    return any(_FEATURES.search(name) and _holds_something(part) for name, part in kwargs.items())


def _holds_something(value: Any) -> bool:
    if isinstance(value, dict):  # encoder outputs by modality, empty for a text turn
        return any(part is not None for part in value.values())
    if isinstance(value, list | tuple | Tensor):
        return len(value) > 0
    return value is not None


def _static_length(cache: Any, layer: int) -> int:
    """The fixed length of a static cache, else -1."""
    part = cache.layers[layer] if len(cache.layers) > layer else None
    return int(part.get_max_length()) if part is not None and part.is_compileable else -1


def _has_holes(mask: Any, total: int) -> bool:
    """Whether some row hides keys behind visible ones: then starts and lengths cannot say it.

    Reads the device, so it is asked at prefill only.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        if mask is not None:
            warnings.warn("an unknown kind of attention mask: decode stays dense", stacklevel=2)
        return mask is not None
    visible = visible_keys(mask)[:, :total].to(torch.int8)  # [B, total], 0..0 1..1 in each row
    falls = (visible.diff(dim=1) < 0).any() | (visible[:, -1] == 0).any()
    return bool(falls)
