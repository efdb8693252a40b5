"""Counts the decode steps that pruned nothing, and says once where that loses a picture."""

import torch

from .families import Anatomy
from .notices import SILENT, DenseReason, Notices
from .stats import Recorder


class DenseSteps:
    """The dense decode steps of one session."""

    def __init__(self, anatomy: Anatomy, recorder: Recorder, notices: Notices) -> None:
        self._anatomy = anatomy
        self._recorder = recorder
        self._notices = notices
        self._unsaid: DenseReason | None = None  # of a compiled step, which cannot warn
        self._unsaid_detail = ""
        self.last_had_picture = False  # the prefill that compiled steps follow

    def add(self, reason: DenseReason, has_picture: bool, detail: str = "") -> None:
        """Count a dense decode step, and warn if a picture is lost by it."""
        self._recorder.add_dense(reason, torch.device("cpu"))
        if has_picture:
            self.warn(reason, detail)

    def add_compiled(self, reason: DenseReason, device: torch.device, detail: str = "") -> None:
        """The same inside a graph: what is to be said waits for `flush`."""
        self._recorder.add_dense(reason, device)
        self._unsaid, self._unsaid_detail = reason, detail

    def flush(self) -> None:
        """Say what compiled steps could not."""
        reason, self._unsaid = self._unsaid, None
        if reason is not None and self.last_had_picture:
            self.warn(reason, self._unsaid_detail)

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
