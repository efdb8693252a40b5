"""What patching a model does, or would do, and which backend serves it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import Choice
from ..bench.cost import OpShape, stored_itemsize
from ..bench.memory import Memory, gib, memory
from ..cache import KVCache
from ..config import PulseConfig
from ..config import resolve as resolve_config
from ..float8 import FLOAT8
from ..visual import VisualTokens
from . import registry
from .families import TESTED, Anatomy, anatomy, attention_layers
from .layer_roles import LayerRoles
from .session import session_of
from .stats import Stats

REQUEST = 32768, 256  # visual and text tokens of the request whose memory is printed


@dataclass(frozen=True)
class ModelExplanation:
    """What `explain(model)` says; print it."""

    model: str
    family: str
    tested: bool
    patched: bool
    decoder: str
    layers: int
    anchors: tuple[int, ...]
    published: int | None
    roles: tuple[str, ...]  # of a decode step, by layer
    looks_back: bool  # a schedule under which some models break
    is_lossless: bool
    dense_because: str | None
    visual_ids: tuple[int, ...]
    base_attention: str
    in_8_bits: bool  # its cache
    backend: Choice
    weight_bytes: int  # of the decoder
    token_bytes: int  # that one more token of the context adds to the cache, of a row
    layer: OpShape  # of full attention, at the request whose memory is printed
    full: tuple[bool, ...]  # which layers are like it
    config: PulseConfig  # of the session, or what was asked about
    ran: Stats | None  # since the patch or the last reset; None of an unpatched model

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that attend to a selection."""
        return tuple(i for i, role in enumerate(self.roles) if role in ("anchor", "follower"))

    def memory(self, visual: int, text: int = 256, rows: int = 1) -> Memory:
        """Bytes that a request holds, and that a step moves of them, by schedule."""
        layer = self.layer._replace(rows=rows, text=text, visual=visual)
        return memory(layer, self.full, self.config)

    def __str__(self) -> str:
        matrix = "in the test matrix" if self.tested else "generic path, not in the test matrix"
        anchor = ", ".join(map(str, self.anchors)) or "none"
        if self.published is not None:
            anchor += f" (published: {self.published})"
        rows = [
            f"{self.model} ({self.family}, {matrix}), {'patched' if self.patched else 'unpatched'}",
            f"decoder    {self.decoder}, {self.layers} layers",
            f"anchor     {anchor}",
            f"sparse     {_runs(self.sparse_layers) or 'no layer'}, as planned",
            f"model's    {_runs([i for i, r in enumerate(self.roles) if r == 'model']) or 'none'}",
            f"visual ids {', '.join(map(str, self.visual_ids))}",
            f"attention  {self.base_attention}, for prefill and the model's own layers",
        ]
        if self.looks_back:
            rows.append("lookback   breaks some models: visionpulse.calibrate tries it on this one")
        each = f"{self.token_bytes / 1024:.4g} KiB a token in the layers of full attention"
        rows.append(
            f"cache      {each}, {'8 bits' if self.in_8_bits else 'the dtype of the model'}"
        )
        visual, text = REQUEST
        request = self.memory(visual, text)
        rows.append(f"memory     of {visual} visual and {text} text tokens: {gib(request.held)}")
        if not self.dense_because:
            rows.append(f"           a step moves {request.moves}")
        if not (self.dense_because or self.in_8_bits) and "dense" in self.roles:
            even = self.weight_bytes / self.token_bytes
            rows.append(
                f"lossless   attention reads as much as the {self.weight_bytes / 1e9:.3g} GB of "
                f"weights\n           at {even:,.0f} tokens, all rows together; drafting pays "
                "from about half of that"
            )
        if self.is_lossless:
            rows.append(
                "runs ahead for one row on a dynamic or a static cache, and for batches on a "
                "dynamic one in session.generate(...); else dense"
            )
        if self.ran is not None:
            rows.append(f"ran        {self.ran.ran}")
        if self.dense_because:
            rows.append(f"stays dense: {self.dense_because}")
        return "\n".join([*rows, "backends", str(self.backend)])


def explain_model(model: Any, config: PulseConfig | str = "10pct") -> ModelExplanation:
    """Describe a model, under its session's setting if it is patched, else under `config`."""
    parts, session = anatomy(model), session_of(model)
    if session is not None:
        roles = session.patched.layer_roles
    else:
        roles = LayerRoles.of(resolve_config(config), parts)
    kind = parts.model.config.model_type
    q, kv = _one_key(parts, roles.config)
    return ModelExplanation(
        model=type(parts.model).__name__,
        family=kind,
        tested=kind in TESTED,
        patched=session is not None,
        decoder=type(parts.decoder).__name__,
        layers=len(parts.full),
        anchors=() if parts.dense_because else roles.anchors,
        published=parts.published,
        roles=tuple(role.value for role in roles.on_refresh),
        looks_back=roles.looks_back,
        is_lossless=session is not None and bool(session.draft),
        dense_because=parts.dense_because,
        visual_ids=parts.visual_ids,
        base_attention=registry.base_name(parts.config),
        token_bytes=2 * kv.k.nbytes * sum(parts.full),
        layer=_layer(q, kv, roles.config),
        full=parts.full,
        config=roles.config,
        in_8_bits=kv.dtype == FLOAT8,
        backend=_backend(q, kv, roles.config),
        weight_bytes=sum(part.numel() * part.element_size() for part in parts.decoder.parameters()),
        ran=None if session is None else session.stats,
    )


def _one_key(parts: Anatomy, config: PulseConfig) -> tuple[Tensor, KVCache]:
    """A query and a cache of one key, with the heads of the model, its dtype and its device."""
    heads = parts.config.num_attention_heads
    kv_heads = getattr(parts.config, "num_key_value_heads", None) or heads
    layer: nn.Module = attention_layers(parts.decoder)[0]
    width = getattr(layer, "head_dim", None) or parts.config.hidden_size // heads
    weight = next(parts.decoder.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    stored = FLOAT8 if config.cache == "fp8" else dtype
    k = torch.zeros(1, kv_heads, 1, width, dtype=stored, device=weight.device)
    return torch.zeros(1, heads, width, dtype=dtype, device=weight.device), KVCache(k, k)


def _layer(q: Tensor, kv: KVCache, config: PulseConfig) -> OpShape:
    visual, text = REQUEST
    heads = q.shape[1], kv.kv_heads, kv.head_dim
    return OpShape(1, *heads, text, visual, q.itemsize, stored_itemsize(config))


def _backend(q: Tensor, kv: KVCache, config: PulseConfig) -> Choice:
    visual = VisualTokens.from_spans([[(0, 1)]], device=q.device)
    return ops.explain(q, kv, visual, config)


def _runs(layers: Any) -> str:
    """Layer numbers as runs: 17-35."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
