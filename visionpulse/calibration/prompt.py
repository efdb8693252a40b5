"""One prompt under a method: what is visual, and what each layer's cache still holds."""

from dataclasses import dataclass, field

from torch import Tensor

from ..visual import VisualTokens


@dataclass
class Prompt:
    """The state between a prefill and the end of its answer; masks are over the prompt's slots."""

    visual: Tensor  # bool [B, N]
    present: Tensor  # bool [B, N], False where padded
    causal: Tensor  # bool [B or 1, 1, N, N], what a query may see by order and padding
    starts: dict[int, Tensor] = field(default_factory=dict)  # int32 [B], of a layer's cache
    # by layer whose cache was cut; -1 stands for all others
    remaining: dict[int, VisualTokens] = field(default_factory=dict)
    step: int = -1  # decode step

    @property
    def counts(self) -> Tensor:
        """Visual tokens per row, [B]."""
        return self.visual.sum(1)

    def visual_of(self, layer: int) -> VisualTokens:
        """The visual tokens in a layer's cache."""
        if layer not in self.remaining:
            if -1 not in self.remaining:
                self.remaining[-1] = VisualTokens.from_mask(self.visual)
            return self.remaining[-1]
        return self.remaining[layer]

    def wanted(self, ratio: float) -> Tensor:
        """How many visual tokens a fixed ratio keeps per row: rounded, at least 1, [B]."""
        counts = self.counts
        return (ratio * counts).round().long().clamp(min=1).minimum(counts)
