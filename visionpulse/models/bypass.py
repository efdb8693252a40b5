"""Notices decode steps that go past the hooks which would prune them."""

import threading
import weakref
from typing import Any

from . import registry
from .arguments import Arguments
from .dense_steps import DenseSteps
from .families import attention_layers
from .notices import DenseReason
from .patched_model import PatchedModel
from .visual_positions import VisualPositions, has_features


class _Place(threading.local):
    """Which parts of the model a thread has entered."""

    base_ran = False  # since the last forward of the whole model
    awaits_decoder = False  # the base model runs a decode step, its decoder has not begun
    in_decoder = False


class Bypass:
    """Follows an eager forward through the model's parts, where one may have been replaced."""

    def __init__(
        self, patched: PatchedModel, positions: VisualPositions, dense: DenseSteps
    ) -> None:
        self._patched = patched
        self._positions = positions
        self._dense = dense
        self._place = _Place()
        self._model = Arguments(patched.anatomy.model)
        self._layer = attention_layers(patched.anatomy.decoder)[0]
        layer_ran = weakref.WeakMethod(self._layer_ran)  # the registry keeps no session alive
        registry.watch(self._layer, lambda: _call(layer_ran))

    def end(self) -> None:
        """Watch no longer."""
        registry.watch(self._layer, None)

    def base_begins(self, is_step: bool) -> None:
        """The base model begins a forward."""
        self._place.base_ran = True
        if is_step and not self._patched.is_paused:
            self._place.awaits_decoder = True

    def decoder_begins(self) -> None:
        """The decoder begins its part."""
        self._place.awaits_decoder, self._place.in_decoder = False, True

    def decoder_ends(self) -> None:
        """The decoder is through."""
        self._place.in_decoder = False

    def base_ends(self, has_failed: bool) -> None:
        """The base model is through: did its step reach the decoder?"""
        if self._place.awaits_decoder:
            self._place.awaits_decoder = False
            if not (has_failed or self._patched.is_paused):
                self._dense.add(DenseReason.DECODER, self._positions.has_picture is True)

    def model_ends(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The whole model is through: did it call the base model that was patched?"""
        if self._patched.is_paused:
            return
        base_ran, self._place.base_ran = self._place.base_ran, False
        if base_ran:
            return
        inputs = self._model.get("input_ids", args, kwargs)
        if inputs is not None and inputs.shape[1] == 1:
            self._dense.add(DenseReason.DECODER, self._positions.has_picture is True)
        else:
            self._positions.has_picture = has_features(kwargs)

    def _layer_ran(self) -> None:
        """An attention layer decodes without a step: does its decoder run?"""
        if not (self._place.in_decoder or self._patched.is_paused):
            self._dense.add(DenseReason.DECODER, self._positions.has_picture is not False)


def _call(method: "weakref.WeakMethod[Any]") -> None:
    live = method()
    if live is not None:
        live()
