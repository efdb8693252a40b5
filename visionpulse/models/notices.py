"""Why a decode step ran dense, and what a session says once.

Silence is for steps that have no picture, and for those that were paused; every other dense step of
a picture is a loss that the user did not ask for.
"""

import threading
import warnings
from enum import Enum
from typing import Any

from ..visual import VisualTokens


class DenseReason(Enum):
    """Why a decode step pruned nothing; the value is its name in statistics."""

    TEXT = "no picture"
    PAUSED = "paused"
    TRAINING = "training"
    DESIGN = "dense by design"
    HOLES = "holes in the mask"
    CACHE_KIND = "unknown cache"
    CACHE_UNSEEN = "cache filled elsewhere"
    PROMPT_UNSEEN = "prompt not seen"
    POSITIONS = "visual tokens not found"
    DECODER = "decoder not called"
    ATTENTION = "attention not called"
    INPUTS = "attention inputs"


SILENT = (DenseReason.TEXT, DenseReason.PAUSED)

_TEXTS = {
    DenseReason.TRAINING: "the model is in training mode, which takes its own attention; call "
    "model.eval()",
    DenseReason.DESIGN: "the model is supported but {detail}; nothing can be pruned in it",
    DenseReason.HOLES: "a row's mask hides keys between visible ones, or is of an unknown kind, so "
    "the model's own attention runs; pad on the left and hide nothing else",
    DenseReason.CACHE_KIND: "a {detail} is no cache of transformers made of layers, so nothing "
    "can be carried in it; use a DynamicCache or a StaticCache",
    DenseReason.CACHE_UNSEEN: "the cache was filled before the model was patched, while the "
    "session was paused, or was rebuilt since, so the places of its pictures are unknown; fill it "
    "again with the patched model",
    DenseReason.PROMPT_UNSEEN: "the prompt came to the decoder as embeddings, past the forward of "
    "{detail}, so the places of its pictures are unknown; call that, or say where they are (all "
    "False without a picture) with visionpulse.set_visual_mask(model, mask) before the prefill",
    DenseReason.POSITIONS: "a picture came with the prompt, but none of its tokens is a visual "
    "token of the config ({detail}), or the decoder got another number of tokens; check that "
    "processor and model belong together, or call visionpulse.set_visual_mask(model, mask) "
    "before generate",
    DenseReason.DECODER: "the decoder that was patched is no longer called ({detail}): part of the "
    "model was replaced, or another path is taken; unpatch the model and patch it again",
    DenseReason.ATTENTION: "no layer called the attention function of visionpulse (the config says "
    "{detail}); unpatch, set the attention implementation, patch again",
    DenseReason.INPUTS: "the anchor was left to the model's own attention: {detail}",
}


class Notices:
    """What one session has said; each kind is said once."""

    def __init__(self) -> None:
        self._said: set[object] = set()
        self._lock = threading.Lock()

    def once(self, kind: object, text: str) -> None:
        """Warn, unless this kind was said before."""
        with self._lock:
            if kind in self._said:
                return
            self._said.add(kind)
        warnings.warn(text, stacklevel=3)

    def dense(self, reason: DenseReason, detail: str) -> None:
        """Say that decode runs dense although its context has a picture."""
        why = _TEXTS[reason].format(detail=detail)
        self.once(
            reason,
            f"visionpulse prunes nothing: {why}. Decode stays right and dense; "
            "visionpulse.explain(model) counts such steps",
        )

    def cache(self, cache: Any) -> None:
        """Say where a cache gives the benefit away."""
        names = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
        if any("Quantized" in name for name in names):
            self.once(
                "quantised",
                "a quantised cache gives full dense copies of keys and values in every step: "
                "pruning stays correct but saves no bandwidth; use a dynamic or a static cache",
            )
        elif getattr(cache, "offloading", False):
            self.once(
                "offloaded",
                "an offloaded cache moves all keys and values in every step: pruning stays "
                "correct but saves none of that; use a dynamic or a static cache if it fits",
            )

    def prompt(self, visual: VisualTokens | None, is_embedded: bool) -> None:
        """Say what is odd about a prompt without image features; only at prefill."""
        is_empty = visual is None or int(visual.counts.max()) == 0
        if is_embedded and is_empty:
            self.once(
                "embeds",
                "no visual token was recognised in inputs_embeds, so decode stays dense; if "
                "pictures are merged into them, call visionpulse.set_visual_mask(model, mask) "
                "before generate",
            )
        elif not is_embedded and not is_empty:
            self.once(
                "features",
                "the prompt has image tokens but no image came with it, so the answer does not "
                "depend on a picture: transformers drops pixel_values where prefill_chunk_size is "
                "set, and for an assistant model; prefill in one piece",
            )
