"""Another attention put on a model: prefill by torch, decode steps on our ops."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..cache import KVCache
from ..models.arguments import Arguments, cache_of_output
from ..models.families import Anatomy, UnsupportedModelError, anatomy
from ..models.session import session_of
from .prompt import Prompt

_names = itertools.count()


class Method:
    """What a model attends to, by hooks; dense by default. One object serves one model."""

    needs_full_layers = True  # refuse models with sliding, chunked or linear attention

    def prepare(self, run: "Run") -> None:
        """Take what else the method needs from the model, or refuse the model."""

    def embed(self, prompt: Prompt, inputs: Tensor) -> Tensor:
        """The embeddings [B, N, width] that go into the decoder."""
        return inputs

    def visible(self, prompt: Prompt, layer: int) -> Tensor | None:
        """Slots [B, N] that queries of this layer may see at prefill, or None for all."""
        return None

    def prefill(self, prompt: Prompt, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Read the queries [B, H, N, D] and keys [B, G, N, D] of a prefill."""

    def after_prefill(self, prompt: Prompt, cache: Any) -> None:
        """Edit the cache after the prefill."""

    def decode(self, prompt: Prompt, layer: int, q: Tensor, kv: KVCache, scale: float) -> Tensor:
        """Attend with one query per row, [B, H, D]."""
        return ops.attend(q, kv, scale=scale)

    def kept(self, prompt: Prompt) -> Tensor | None:
        """Visual tokens per row that pruned layers attended to in the step just done, [B]."""
        return None


class Run:
    """A method at work on a model; made by `apply`."""

    def __init__(self, model: Any, method: Method) -> None:
        if session_of(model) is not None:
            raise ValueError("the model is patched; unpatch it before a method is applied")
        self.parts: Anatomy = anatomy(model)
        if method.needs_full_layers and not all(self.parts.full):
            raise UnsupportedModelError(
                f"{self.parts.config.model_type} has layers without full attention; "
                "the method is defined for full attention in every layer"
            )
        self.method = method
        self.prompt: Prompt | None = None
        self.kept: list[Tensor] = []  # [B] per decode step
        self.shares: list[Tensor] = []  # [B] per decode step, of the visual tokens
        self._undo: list[Any] = []
        self._ids: Tensor | None = None
        self._arguments = Arguments(self.parts.decoder)
        method.prepare(self)
        self.take_attention(self.parts.config, self._attention)
        for module, before in (
            (self.parts.base, self._before_base),
            (self.parts.decoder, self._before_decoder),
        ):
            self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        after = self.parts.decoder.register_forward_hook(self._after_decoder, with_kwargs=True)
        self._undo.append(after.remove)

    @property
    def retention(self) -> float:
        """Mean share of the visual tokens that pruned layers attended to; NaN without a step."""
        if not self.shares:
            return float("nan")
        return float(torch.cat(self.shares).mean())

    def take_attention(self, config: Any, attention: Any) -> None:
        """Point a config at an attention function of ours until the run ends."""
        from transformers import AttentionInterface
        from transformers.masking_utils import (
            ALL_MASK_ATTENTION_FUNCTIONS,
            AttentionMaskInterface,
        )

        name, before = f"visionpulse_method_{next(_names)}", config._attn_implementation
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        config._attn_implementation_internal = name

        def undo() -> None:
            config._attn_implementation_internal = before
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)

        self._undo.append(undo)

    def close(self) -> None:
        """Restore the model."""
        while self._undo:
            self._undo.pop()()

    def _before_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._ids = kwargs.get("input_ids", args[0] if args else None)

    def _before_decoder(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        inputs = kwargs["inputs_embeds"]
        batch, size = inputs.shape[:2]
        if size > 1:
            self.prompt = self._prompt_of(kwargs, batch, size)
            kwargs = {**kwargs, "inputs_embeds": self.method.embed(self.prompt, inputs)}
        elif self.prompt is None or len(self.prompt.visual) != batch:
            raise ValueError(
                f"a decode step of {batch} rows without a prompt of as many; "
                "a method serves one generate() at a time, without beams"
            )
        else:
            self.prompt.step += 1
        return args, kwargs

    def _prompt_of(self, kwargs: dict[str, Any], batch: int, size: int) -> Prompt:
        cache, ids = self._arguments.cache((), kwargs), self._ids
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                "the cache already holds a prompt; a method selects its tokens once, "
                "so give the whole conversation as one prompt"
            )
        if ids is None or ids.shape != (batch, size):
            raise ValueError(
                "a method finds the visual tokens by their ids: pass input_ids, not inputs_embeds"
            )
        visual = torch.isin(ids, torch.tensor(self.parts.visual_ids, device=ids.device))
        mask = kwargs.get("attention_mask")
        present = torch.ones_like(visual)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            present = mask.bool()
        order = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril()
        causal = order & present[:, None, None, :]
        # a padded query sees itself alone: a row without keys would be NaN
        causal = causal | torch.eye(size, dtype=torch.bool, device=ids.device)
        return Prompt(visual & present, present, causal)

    def _after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        prompt = self.prompt
        assert prompt is not None
        if prompt.step < 0:
            padding = (~prompt.present).sum(1).to(torch.int32)
            prompt.starts = dict.fromkeys(range(len(self.parts.full)), padding)
            self.method.after_prefill(prompt, cache_of_output(output))
            return
        kept = self.method.kept(prompt)
        if kept is not None:
            self.kept.append(kept)
            self.shares.append(kept / prompt.counts.clamp(min=1))

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend: query [B, H, Q, D] to [B, Q, H, D]."""
        prompt, layer = self.prompt, int(module.layer_idx)  # type: ignore[arg-type]
        assert prompt is not None
        if not self.parts.full[layer]:
            return self._plain(module, query, key, value, attention_mask, scaling, kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if query.shape[2] == 1:
            kv = KVCache(key, value, starts=prompt.starts[layer])
            out = self.method.decode(prompt, layer, query[:, :, 0], kv, scale)
            return out[:, None], None
        self.method.prefill(prompt, layer, query, key, scale)
        seen, mask = self.method.visible(prompt, layer), prompt.causal
        if seen is not None:
            itself = torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
            mask = mask & (seen[:, None, None, :] | itself)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    @staticmethod
    def _plain(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, None]:
        """A layer without full attention: as transformers does it, for the mask it made."""
        from transformers import AttentionInterface

        interface: Any = AttentionInterface
        out = interface()["sdpa"](module, query, key, value, mask, scaling=scaling, **kwargs)
        return out  # type: ignore[no-any-return]


@contextmanager
def apply(model: Any, method: Method) -> Iterator[Run]:
    """Run a method on a model of transformers until the block ends."""
    run = Run(model, method)
    try:
        yield run
    finally:
        run.close()
