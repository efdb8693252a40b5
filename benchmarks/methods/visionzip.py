"""VisionZip: before the language model, keep what the vision tower looks at and merge the rest."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpulse.calibration.method import Method, Run
from visionpulse.calibration.prompt import Prompt
from visionpulse.models.families import UnsupportedModelError

from .evict import best, evict


def zip_tokens(
    features: Tensor, keys: Tensor, dominant: Tensor, contextual: int
) -> tuple[Tensor, Tensor]:
    """Merge all but the dominant tokens of one picture into `contextual` of them.

    features [n, width], keys [n, d], dominant bool [n]. Targets lie evenly among the rest; each
    leftover goes to the target whose key is most similar, and the mean of what a target receives
    is added to it. Returns the new features and what is kept, bool [n].
    """
    rest = (~dominant).nonzero()[:, 0]
    contextual = min(contextual, len(rest))
    if not contextual:
        return features, dominant
    every = max(1, len(rest) // contextual)
    is_target = torch.zeros(len(rest), dtype=torch.bool, device=features.device)
    is_target[torch.arange(contextual, device=features.device) * every] = True
    targets, leftovers = rest[is_target], rest[~is_target]
    unit = F.normalize(keys.float(), dim=-1)
    goes_to = (unit[leftovers] @ unit[targets].T).argmax(1)
    received = features.new_zeros(contextual, features.shape[1])
    received.index_add_(0, goes_to, features[leftovers])
    shares = torch.bincount(goes_to, minlength=contextual).clamp(min=1)
    features = features.clone()
    features[targets] += received / shares[:, None].to(features.dtype)
    kept = dominant.clone()
    kept[targets] = True
    return features, kept


@dataclass
class VisionZip(Method):
    """Keep a fixed share of the visual tokens: dominant ones, and contextual ones of the rest.

    Dominant are those that receive most attention in the last block of the vision tower, averaged
    over heads and queries: the towers of the Qwen-VL kind have no class token to ask. With a
    merger, a token has the mean over its window. `contextual` is the share of the kept ones that
    are merged (10 of 64 in the published setting). The language model never sees the others;
    positions stay as they were. Features that later layers add (DeepStack) are not merged.
    """

    ratio: float
    contextual: float = 10 / 64
    _received: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    _keys: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    _keep: Tensor | None = field(default=None, init=False, repr=False)  # bool [B, N]

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"VisionZip takes a ratio in (0, 1], got {self.ratio!r}")
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual is a share in [0, 1), got {self.contextual!r}")

    def prepare(self, run: Run) -> None:
        config = getattr(run.parts.model.config, "vision_config", None)
        if config is None or not hasattr(config, "spatial_merge_size"):
            raise UnsupportedModelError(
                f"{run.parts.model.config.model_type} has no vision tower of the Qwen-VL kind, "
                "whose attention VisionZip ranks by here"
            )
        self._received, self._keys = {}, {}
        run.take_attention(config, self._look)

    def _look(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend within one picture, [1, H, n, d], and note what each patch receives."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        share = (scale * query.float() @ key.float().transpose(2, 3)).softmax(-1)
        self._received.setdefault(id(module), []).append(share.mean((1, 2))[0])
        self._keys.setdefault(id(module), []).append(key.mean(1)[0])
        out = share.to(value.dtype) @ value
        return out.transpose(1, 2).contiguous(), None

    def embed(self, prompt: Prompt, inputs: Tensor) -> Tensor:
        text = prompt.present & ~prompt.visual
        total = int(prompt.visual.sum())
        self._keep = text
        if not total:
            return inputs
        last = next(reversed(self._received))  # blocks are met in their order
        share, keys = torch.cat(self._received[last]), torch.cat(self._keys[last])
        self._received, self._keys = {}, {}
        if len(share) % total:
            raise ValueError(
                f"the tower has {len(share)} patches for {total} visual tokens; expected a "
                "whole number of patches to a token: pass the pictures with this prompt"
            )
        window = len(share) // total
        share, keys = share.view(total, window).mean(1), keys.view(total, window, -1).mean(1)
        inputs, keep = inputs.clone(), text.clone()
        begin = 0
        for b, n in enumerate(prompt.counts.tolist()):
            if not n:
                continue
            here = prompt.visual[b]
            part = slice(begin, begin + n)
            begin += n
            wanted = max(1, round(self.ratio * n))
            merged = min(round(self.contextual * wanted), wanted - 1)
            dominant = best(share[part], torch.ones_like(here[here]), torch.tensor(wanted - merged))
            inputs[b, here], keep[b, here] = zip_tokens(
                inputs[b, here], keys[part], dominant, merged
            )
        self._keep = keep
        return inputs

    def visible(self, prompt: Prompt, layer: int) -> Tensor | None:
        return self._keep

    def after_prefill(self, prompt: Prompt, cache: Any) -> None:
        assert self._keep is not None
        for layer in range(len(cache.layers)):
            evict(cache, layer, self._keep, prompt)

    def kept(self, prompt: Prompt) -> Tensor:
        assert self._keep is not None
        return torch.sum(self._keep & prompt.visual, 1)
