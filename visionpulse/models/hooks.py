"""The hooks on a patched model: they give each decode step its context, and prefills to `Prefill`.

They know no session: what they need of it is the `PatchedModel`.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import MAX_QUERIES
from .arguments import Arguments, cache_of_output
from .attention import CONTEXT
from .bypass import Bypass
from .continuous import ContinuousBatching
from .conversation import Conversation
from .dense_steps import DenseSteps
from .float8_layers import Float8, announce
from .kv_layers import attach, conversation_of
from .notices import DenseReason
from .patched_model import PatchedModel
from .prefill import Prefill
from .step import Step
from .visual_positions import VisualPositions

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class _Forward(threading.local):
    """What the forward under way in a thread hands from hook to hook."""

    token: Tensor | None = None  # [B, Q], of a decode step whose trace is recorded
    has_own_mask = False  # the caller says by a mask [B, 1, Q, N] what each query sees
    conversation: Conversation | None = None  # of a cache that the decoder makes itself


class Hooks:
    """The hooks on one model, its base model and its decoder."""

    def __init__(self, patched: PatchedModel) -> None:
        anatomy = patched.anatomy
        self._patched = patched
        self._layer = anatomy.first_full
        self._base = Arguments(anatomy.base)
        self._decoder = Arguments(anatomy.decoder)
        self._forward = _Forward()
        self.positions = VisualPositions(anatomy, self._base)
        self.dense = DenseSteps(anatomy, patched.recorder, patched.notices)
        self._bypass = Bypass(patched, self.positions, self.dense)
        self._continuous = ContinuousBatching(patched)
        # a prefill reads the device; disabled here, not by decorators, which would import dynamo
        eager: Callable[..., Any] = torch.compiler.disable
        self._read_prompt = eager(self._read)
        self._take_prefill = eager(Prefill(patched, self.positions, self.dense).take)
        self._handles = [
            anatomy.base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            anatomy.base.register_forward_hook(self._after_base, always_call=True),
            anatomy.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            anatomy.decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        # a lossless model answers from a check without its base
        if anatomy.model is not anatomy.base and patched.mode is None:
            after = anatomy.model.register_forward_hook(self._after_model, with_kwargs=True)
            self._handles.append(after)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._bypass.end()
        self._continuous.end()

    def _before_base(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        patched, is_eager = self._patched, not torch.compiler.is_compiling()
        ids = self._base.get("input_ids", args, kwargs)
        is_step = ids is not None and ids.shape[1] == 1
        if is_eager:
            self._bypass.base_begins(is_step)
        if patched.is_paused:
            if is_eager:
                self.positions.has_picture = None
        elif patched.is_checking:
            pass  # the tokens of a draft are no prompt
        elif not is_step:
            self._read_prompt(ids, args, kwargs)
            mask = self._base.get("attention_mask", args, kwargs)
            self._forward.has_own_mask = isinstance(mask, Tensor) and mask.dim() > 2
        if not patched.is_paused and patched.recorder.record:
            self._forward.token = ids

    def _read(self, ids: Tensor | None, args: Args, kwargs: Kwargs) -> None:
        self.dense.warn_held()
        self.positions.read(ids, args, kwargs)

    def _after_base(self, module: nn.Module, args: Args, output: Any) -> None:
        """Leave nothing behind, also when the forward failed between the two hooks."""
        if torch.compiler.is_compiling():
            return
        self._bypass.base_ends(has_failed=output is None)
        if self.positions.passed_base or self._forward.token is not None:
            self.positions.forget_forward()
            self._forward.token = self._forward.conversation = None

    def _before_decoder(
        self, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        patched, is_eager = self._patched, not torch.compiler.is_compiling()
        if is_eager:
            self._bypass.decoder_begins()
        inputs = self._decoder.get("inputs_embeds", args, kwargs)
        if inputs is None:
            inputs = self._decoder.get("input_ids", args, kwargs)
        cache = self._decoder.cache(args, kwargs)
        announce(cache, is_step=False)
        if patched.is_paused or module.training:
            if is_eager and inputs is not None and inputs.shape[1] == 1:
                reason = DenseReason.PAUSED if patched.is_paused else DenseReason.TRAINING
                self.dense.add(reason, self.positions.has_picture is True)
            return None
        if inputs is None:
            raise TypeError(
                f"{type(module).__name__} was called with neither input_ids nor inputs_embeds, "
                "so no token is known; unpatch the model, or pause the session for this call"
            )
        conversation = conversation_of(cache, self._layer)
        if patched.is_checking:
            return self._dense_step(conversation, args, kwargs, inputs)
        if cache is not None and self._is_step(inputs):
            if conversation is not None and patched.stays_dense:
                self._add_lossless(conversation, inputs)
                return self._dense_step(conversation, args, kwargs, inputs)
            if conversation is not None and conversation.has_holes:
                self.dense.add_step(DenseReason.HOLES, conversation, inputs.device)
                return None
            if conversation is not None:
                return args, {**kwargs, CONTEXT: self._step(cache, conversation, inputs.shape[1])}
        mask = self._decoder.get("attention_mask", args, kwargs)
        conversation = self._take_prefill(cache, inputs, mask)
        if conversation is not None:
            self._forward.conversation = conversation
        return None

    def _dense_step(
        self, conversation: Conversation | None, args: Args, kwargs: Kwargs, inputs: Tensor
    ) -> tuple[Args, Kwargs] | None:
        """A dense forward of a lossless model, on our kernels where they are faster."""
        if conversation is None or conversation.has_holes:
            return None
        if torch.compiler.is_compiling() and self._patched.mode.graphs is None:
            return None
        queries = inputs.shape[1]
        if not self._patched.has_dense_kernel(inputs.device, queries):
            return None
        step = Step(self._patched, conversation, None, queries, is_dense=True)
        return args, {**kwargs, CONTEXT: step}

    def _add_lossless(self, conversation: Conversation, inputs: Tensor) -> None:
        """Count a dense step of a lossless model, which did not run ahead."""
        mode = self._patched.mode
        is_others = torch.compiler.is_compiling() and mode.graphs is None
        detail = "a compiled step" if is_others else mode.refusal
        text = conversation.visual is None and conversation.unknown_because is None
        reason = DenseReason.LAST_SLOT if mode.is_at_end else DenseReason.UNPAID
        reason = DenseReason.LOSSLESS if detail else reason
        reason = DenseReason.TEXT if text else reason
        self.dense.add_step(reason, conversation, inputs.device, detail)

    def _is_step(self, inputs: Tensor) -> bool:
        """Whether a forward behind a cache decodes: one token, or several where they may be sparse.

        A new picture is a prefill.
        """
        queries = inputs.shape[1]
        if queries == 1:
            return True
        if self._patched.layer_roles.config.queries == "dense" or queries > MAX_QUERIES:
            return False
        positions = self.positions
        has_picture = positions.has_features or positions.user_mask is not None
        return positions.passed_base and not (has_picture or self._forward.has_own_mask)

    def _step(self, cache: Any, conversation: Conversation, queries: int) -> Step:
        patched = self._patched
        token = self._forward.token if patched.recorder.record else None
        step = Step(patched, conversation, token, queries, kv_layers=cache.layers)
        if not step.is_compiled:
            conversation.steps += queries
            if patched.stores_8_bits and not isinstance(cache.layers[self._layer], Float8):
                patched.fit_layers(cache)  # the setting changed behind the prompt
        announce(cache, is_step=True)
        return step

    def _after_decoder(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        """Count a step without a selection; attach the conversation to a cache of the decoder."""
        step = kwargs.get(CONTEXT)
        if step is not None and not step.has_selected and not step.is_dense:
            self.dense.add_unselected(step, output)
        if torch.compiler.is_compiling():
            return
        self._bypass.decoder_ends()
        conversation = self._forward.conversation
        if conversation is None:
            return
        self._forward.conversation = None
        cache = cache_of_output(output)
        if cache is not None:
            attach(cache, self._layer, conversation)
            if self._patched.stores_8_bits:
                self._patched.fit_layers(cache)

    def _after_model(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._bypass.model_ends(args, kwargs)
