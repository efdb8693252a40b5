"""Counts the decode steps that pruned nothing, and warns once where that loses a picture."""

from typing import Any

import torch

from .conversation import Conversation
from .families import Anatomy
from .notices import SILENT, DenseReason, Notices
from .stats import Recorder
from .step import Step


class DenseSteps:
    """The dense decode steps of one session."""

    def __init__(self, anatomy: Anatomy, recorder: Recorder, notices: Notices) -> None:
        self._anatomy = anatomy
        self._recorder = recorder
        self._notices = notices
        self._held: tuple[DenseReason, str] | None = None  # a graph cannot warn: reason, detail
        self.prefill_has_picture = False  # of the prefill that compiled steps follow

    def add(self, reason: DenseReason, has_picture: bool, detail: str = "") -> None:
        """Count an eager step, and warn if a picture is lost by it."""
        self._recorder.add_dense(reason, torch.device("cpu"))
        if has_picture:
            self.warn(reason, detail)

    def add_step(
        self,
        reason: DenseReason,
        conversation: Conversation,
        device: torch.device,
        detail: str = "",
    ) -> None:
        """Count a step of a conversation; a compiled one holds its warning for `warn_held`."""
        if torch.compiler.is_compiling():  # and reads no more of the conversation: a guard each
            self._recorder.add_dense(reason, device)
            self._held = reason, detail
        else:
            lost = conversation.has_picture or conversation.unknown_because is not None
            self.add(reason, lost, detail)

    def add_unselected(self, step: Step, output: Any) -> None:
        """Count a step in which no anchor selected, by the reason that it shows."""
        detail = ""
        if step.visual is None:
            reason = step.conversation.unknown_because or DenseReason.TEXT
        elif self._anatomy.dense_because:
            reason = DenseReason.DESIGN
        elif not step.layer_roles.anchors and step.refusal is None:
            reason = DenseReason.ASKED
        elif step.refusal is not None:
            reason, detail = DenseReason.INPUTS, step.refusal
        else:
            reason = DenseReason.ATTENTION
        self.add_step(reason, step.conversation, output[0].device, detail)

    def warn_held(self) -> None:
        """Say what compiled steps held back."""
        held, self._held = self._held, None
        if held is not None and self.prefill_has_picture:
            self.warn(*held)

    def warn(self, reason: DenseReason, detail: str = "") -> None:
        """Say why a picture is decoded dense, once for each reason."""
        if reason in SILENT:
            return
        parts = self._anatomy
        details = {
            DenseReason.DESIGN: parts.dense_because,
            DenseReason.PROMPT_UNSEEN: type(parts.base).__name__,
            DenseReason.POSITIONS: ", ".join(map(str, parts.visual_ids)),
            DenseReason.DECODER: type(parts.decoder).__name__,
            DenseReason.ATTENTION: parts.config._attn_implementation,
        }
        self._notices.dense(reason, detail or details.get(reason) or "")
