"""The attention function behind our name: a layer's role in a decode step, else the model's own."""

from typing import Any

import torch
from torch import Tensor, nn

from ..schedule import Role
from . import registry
from .registry import base_attention

CONTEXT = "visionpulse"  # the keyword that carries the step of one forward


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the layer's role says: query [B, H, Q, D] to [B, Q, H, D].

    Without a step in the keywords it is the model's own attention: in prefill, in training, in a
    paused session, and for any other model that shares the config.
    """
    step = kwargs.pop(CONTEXT, None)
    if step is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        role = step.roles[layer]
        if (
            role is not Role.MODEL
            and key.shape == value.shape
            and not (attention_mask is None and step.needs_mask)
            and not query.requires_grad
            and kwargs.get("s_aux") is None
            and kwargs.get("position_bias") is None
            and not _wants_weights(module, kwargs)
        ):
            out = step.run(
                role, layer, query, key, value, attention_mask,
                kwargs.get("scaling"), kwargs.get("softcap"),
            )  # fmt: skip
            return out, None
        if role is not Role.MODEL:
            step.refusal = _refusal(module, query, key, value, attention_mask, kwargs)
        key, value = step.read_back(layer, key, value, query.dtype)
    elif query.shape[2] == 1 and not torch.compiler.is_compiling():
        registry.report_bypass(module)
    result = base_attention(module)(module, query, key, value, attention_mask, **kwargs)
    return result  # type: ignore[no-any-return]


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller collects the attention weights; the kernels never hold them."""
    config: Any = module.config
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))


def _refusal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> str:
    """Why a layer was left to the model's own attention."""
    if key.shape != value.shape:
        return f"keys are {tuple(key.shape)}, values {tuple(value.shape)}"
    if query.requires_grad:
        return "the query needs a gradient; decode under torch.no_grad()"
    if kwargs.get("s_aux") is not None:
        return "it has sinks"
    if kwargs.get("position_bias") is not None:
        return "it has a position bias"
    if _wants_weights(module, kwargs):
        return (
            "output_attentions=True asks for weights, which the kernels do not make; of the "
            "model's own, only 'eager' returns them"
        )
    return "a static cache came without a mask; pass attention_mask"
