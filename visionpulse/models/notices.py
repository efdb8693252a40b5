"""The reasons for a dense decode step, and the warnings of a session, each said once.

Steps without a picture, paused ones, those of a dense schedule or a policy, and the last of a
static cache are silent. Every other dense step loses something that the user did not give up.
"""

import threading
import warnings
from enum import Enum
from typing import Any

from ..visual import VisualTokens


class DenseReason(Enum):
    """Why a decode step pruned nothing; the value is its name in statistics."""

    TEXT = "no picture"
    ASKED = "as asked"
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
    LOSSLESS = "lossless, not run ahead"
    UNPAID = "drafting would not pay"
    LAST_SLOT = "last slots of a static cache"


SILENT = (
    DenseReason.TEXT, DenseReason.ASKED, DenseReason.PAUSED, DenseReason.UNPAID,
    DenseReason.LAST_SLOT,
)  # fmt: skip

_TEXTS = {
    DenseReason.TRAINING: "the model is in training mode, which runs its own attention; call "
    "model.eval()",
    DenseReason.DESIGN: "the model is supported but {detail}; nothing can be pruned in it",
    DenseReason.HOLES: "a row's mask hides keys between visible ones, or is of an unknown kind, so "
    "the model's own attention runs; pad on the left and hide nothing else",
    DenseReason.CACHE_KIND: "a {detail} is no transformers cache with layers, so it cannot "
    "carry the positions of visual tokens; use a DynamicCache or a StaticCache",
    DenseReason.CACHE_UNSEEN: "the cache was filled before the model was patched, while the "
    "session was paused, or was rebuilt since, so the positions of its pictures are unknown; "
    "fill it again with the patched model",
    DenseReason.PROMPT_UNSEEN: "the prompt came to the decoder as embeddings, past the forward of "
    "{detail}, so the positions of its pictures are unknown; call that, or pass them (all False "
    "without a picture) to visionpulse.set_visual_mask(model, mask) before the prefill",
    DenseReason.POSITIONS: "a picture came with the prompt, but none of its tokens is a visual "
    "token of the config ({detail}), or the decoder got another number of tokens; check that "
    "processor and model belong together, or call visionpulse.set_visual_mask(model, mask) "
    "before generate",
    DenseReason.DECODER: "the patched decoder is not called ({detail}): part of the model was "
    "replaced, or the forward goes another way; unpatch the model and patch it again",
    DenseReason.ATTENTION: "no layer called the attention function of visionpulse (the config says "
    "{detail}); unpatch, set the attention implementation, patch again",
    DenseReason.LOSSLESS: "lossless decoding runs ahead for one row, and on dynamic caches for "
    "batches in session.generate(...); this is {detail}",
    DenseReason.INPUTS: "the anchor was left to the model's own attention: {detail}",
}


class Notices:
    """The warnings of one session; each kind is said once."""

    def __init__(self) -> None:
        self._kinds_said: set[object] = set()
        self._lock = threading.Lock()

    def once(self, kind: object, text: str) -> None:
        """Warn, unless this kind has been said."""
        with self._lock:
            if kind in self._kinds_said:
                return
            self._kinds_said.add(kind)
        warnings.warn(text, stacklevel=3)

    def dense(self, reason: DenseReason, detail: str) -> None:
        """Warn that decode runs dense although its context has a picture."""
        why = _TEXTS[reason].format(detail=detail)
        self.once(
            reason,
            f"visionpulse prunes nothing: {why}. Decode is correct but dense; "
            "visionpulse.explain(model) counts such steps",
        )

    def ragged(self, reason: str) -> None:
        """Warn that a batch is decoded one token at a time."""
        self.once(
            ("ragged", reason),
            f"session.generate runs ahead for greedy and sampled rows; this is {reason}. Decode is "
            "correct but dense",
        )

    def cache(self, cache: Any) -> None:
        """Warn where a cache loses the benefit."""
        names = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
        if any("Quantized" in name for name in names):
            self.once(
                "quantised",
                "a quantised cache returns dense copies of all keys and values in every step: "
                "pruning stays correct but saves no bandwidth; use a dynamic or a static cache",
            )
        elif getattr(cache, "offloading", False):
            self.once(
                "offloaded",
                "an offloaded cache moves all keys and values in every step: pruning stays "
                "correct but saves none of that; use a dynamic or a static cache if it fits",
            )

    def prompt(self, visual: VisualTokens | None, is_embedded: bool) -> None:
        """Warn of tokens and pictures that do not match, in a prefill without image features."""
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
