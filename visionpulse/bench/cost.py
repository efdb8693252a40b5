"""What a decode step costs: operations and bytes, counted by hand, and the time they predict.

Bytes are what the algorithm must move at least: every key and value it uses once, queries, outputs
and indices. Scratch that an implementation spills is not counted, so a share of the ceiling shows
that spill as a loss. One function per op; benchmarks and tests take their counts from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import schedule
from ..config import PulseConfig
from ..files import read_json
from ..schedule import Role


@dataclass(frozen=True)
class Decoder:
    """The numbers of a text decoder that its cost depends on."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True  # three matrices in the FFN instead of two
    experts: int = 1  # FFNs per layer
    active: int = 1  # FFNs that one token uses
    full: tuple[bool, ...] = ()  # which layers attend to all keys; empty is all

    @classmethod
    def of(cls, config: Any) -> "Decoder":
        """Take the numbers from a transformers config, its dict, or a path to config.json."""
        fields = _fields(config)
        missing = [name for name in _NEEDED if name not in fields]
        if missing:
            raise ValueError(
                f"the config has no {', '.join(missing)}; pass the config of a transformers "
                f"decoder, or of a model that has one as text_config"
            )
        heads, layers = int(fields["num_attention_heads"]), int(fields["num_hidden_layers"])
        width, kinds = int(fields["hidden_size"]), fields.get("layer_types")
        experts = int(fields.get("num_experts") or fields.get("num_local_experts") or 1)
        ffn = fields.get("moe_intermediate_size") if experts > 1 else None
        return cls(
            layers=layers,
            width=width,
            ffn=int(ffn or fields["intermediate_size"]),
            heads=heads,
            kv_heads=int(fields.get("num_key_value_heads") or heads),
            head_dim=int(fields.get("head_dim") or width // heads),
            vocab=int(fields["vocab_size"]),
            gated=str(fields.get("hidden_act") or fields.get("hidden_activation") or "silu")
            in _GATED_WITH,
            experts=experts,
            active=int(fields.get("num_experts_per_tok") or 1) if experts > 1 else 1,
            full=tuple(kind == "full_attention" for kind in kinds) if kinds else (True,) * layers,
        )

    @property
    def is_full(self) -> tuple[bool, ...]:
        """Which layers attend to all keys."""
        return self.full or (True,) * self.layers

    @property
    def projections(self) -> int:
        """Weights of the four attention matrices of one layer."""
        return 2 * self.width * self.head_dim * (self.heads + self.kv_heads)

    @property
    def one_ffn(self) -> int:
        """Weights of one FFN."""
        return (3 if self.gated else 2) * self.width * self.ffn

    def weights(self, rows: int = 1) -> int:
        """Weights that one step of `rows` tokens must read, the output matrix included."""
        experts = min(self.experts, rows * self.active)
        return self.layers * (self.projections + experts * self.one_ffn) + self.width * self.vocab


# Activations of families whose FFN multiplies two branches.
_GATED_WITH = ("silu", "swish", "gelu_pytorch_tanh", "gelu_tanh")
_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)

# Decoders of the published models, so that a machine without a network can ask about them.
KNOWN = {
    "qwen3-vl-4b": Decoder(36, 2560, 9728, 32, 8, 128, 151936),
    "qwen3-vl-8b": Decoder(36, 4096, 12288, 32, 8, 128, 151936),
    "internvl3.5-4b": Decoder(36, 2560, 9728, 32, 8, 128, 151936),
    "internvl3.5-8b": Decoder(36, 4096, 12288, 32, 8, 128, 151936),
}


def decoder_of(what: Any) -> Decoder:
    """A decoder by published name, path to a config.json (or its folder), config or dict."""
    if isinstance(what, Decoder):
        return what
    if isinstance(what, str) and what in KNOWN:
        return KNOWN[what]
    if isinstance(what, str | Path):
        path = Path(what)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise ValueError(
                f"no decoder {str(what)!r}; known: {', '.join(KNOWN)}; "
                "or give the path to a config.json"
            )
        what = read_json(path, f"known: {', '.join(KNOWN)}")
        if not isinstance(what, dict):
            raise ValueError(f"{path} holds no config of a decoder")
    return Decoder.of(what)


def _fields(config: Any) -> Mapping[str, Any]:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    fields: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    inner = fields.get("text_config") or fields.get("llm_config")
    return inner if isinstance(inner, Mapping) else fields


# --- operations, as the paper counts them and with what it leaves out ---------------------------


def paper_flops(decoder: Decoder, prompt: int, visual: int, generated: int) -> int:
    """Eq. 1 of the paper: prefill and decoding, K and V as wide as Q, two FFN matrices."""
    d, m, context = decoder.width, decoder.ffn, prompt + visual
    linear = 8 * d * d + 4 * m * d
    prefill = context * linear + 4 * d * context * context
    return decoder.layers * (prefill + _decoding(linear, 4 * d, context, generated))


def flops(decoder: Decoder, prompt: int, visual: int, generated: int) -> int:
    """Eq. 1 with the decoder's own matrices: narrow K and V (GQA), a gated FFN, active experts."""
    context, attention = prompt + visual, 4 * decoder.heads * decoder.head_dim
    linear = 2 * (decoder.projections + decoder.active * decoder.one_ffn)
    prefill = context * linear + attention * context * context
    return decoder.layers * (prefill + _decoding(linear, attention, context, generated))


def _decoding(linear: int, per_key: int, context: int, generated: int) -> int:
    """The sum of both forms over the tokens t = 1 .. generated, each seeing context + t keys."""
    keys = generated * context + generated * (generated + 1) // 2
    return generated * linear + per_key * keys


# --- bytes and operations of one op, of all rows ----------------------------------------------


class OpShape(NamedTuple):
    """One op's problem: `text` and `visual` keys of each of `rows` rows."""

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    text: int
    visual: int
    itemsize: int  # bytes of an element of q and the output
    kv_itemsize: int | None = None  # of K and V; None: the same; 1: 8 bits, a scale for each head

    @property
    def keys(self) -> int:
        """Visible keys of a row."""
        return self.text + self.visual

    @property
    def cache_bytes(self) -> int:
        """K and V of all rows, with their scales."""
        return 2 * (self.keys * self._key_bytes + self._scale_bytes)

    @property
    def _key_bytes(self) -> int:
        """Bytes of one token's keys (or values), all KV heads of all rows."""
        return self.rows * self.kv_heads * self.head_dim * (self.kv_itemsize or self.itemsize)

    @property
    def _scale_bytes(self) -> int:
        """Bytes of the scales of K (or V), float32 for each KV head: all rows share them."""
        return 4 * self.kv_heads if self.kv_itemsize == 1 else 0

    @property
    def _query_bytes(self) -> int:
        return self.rows * self.heads * self.head_dim * self.itemsize


class Work(NamedTuple):
    """Bytes read in order, bytes of rows gathered by index, and operations of one op."""

    streamed: int
    gathered: int
    flops: int

    @property
    def bytes(self) -> int:
        """All that must move."""
        return self.streamed + self.gathered

    def plus(self, other: "Work") -> "Work":
        """The work of both."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> "Work":
        """The work of `count` such ops."""
        return Work(*(count * a for a in self))


NOTHING = Work(0, 0, 0)


def dense(shape: OpShape) -> Work:
    """Attention over all keys: K and V once."""
    bytes_ = shape.cache_bytes + 2 * shape._query_bytes
    return Work(bytes_, 0, shape.rows * 4 * shape.heads * shape.head_dim * shape.keys)


def score(shape: OpShape) -> Work:
    """Scores of all visual tokens and the masses: K once, one float32 score per visual token."""
    keys = shape.keys * shape._key_bytes + shape._scale_bytes
    bytes_ = keys + shape._query_bytes + 4 * shape.rows * shape.visual
    return Work(bytes_, 0, shape.rows * 2 * shape.heads * shape.head_dim * shape.keys)


def select(shape: OpShape, kept: int) -> Work:
    """The K best of the scores: each score once, each kept index once."""
    return Work(4 * shape.rows * (shape.visual + kept), 0, 0)


def attend(shape: OpShape, kept: int) -> Work:
    """A follower: K and V of the text in order, of `kept` visual tokens by index."""
    text = 2 * (shape.text * shape._key_bytes + shape._scale_bytes + shape._query_bytes)
    text += 4 * shape.rows * kept
    keys = shape.text + kept
    operations = shape.rows * 4 * shape.heads * shape.head_dim * keys
    return Work(text, 2 * kept * shape._key_bytes, operations)


def decode(shape: OpShape, kept: int, anchor_output: str = "pruned") -> Work:
    """The anchor, fused: K once; V of text and kept tokens, or of all; the indices written."""
    written = 2 * (shape._query_bytes + shape._scale_bytes) + 4 * shape.rows * kept
    keys = shape.keys if anchor_output == "dense" else shape.text + kept
    gathered = 0 if anchor_output == "dense" else kept * shape._key_bytes
    values = keys * shape._key_bytes - gathered
    operations = shape.rows * 2 * shape.heads * shape.head_dim * (shape.keys + keys)
    return Work(shape.keys * shape._key_bytes + values + written, gathered, operations)


# --- one decode step ------------------------------------------------------------------------------


class StepWork(NamedTuple):
    """The work of one decode step of the whole model."""

    weights: Work
    attention: Work

    @property
    def bytes(self) -> int:
        """All that must move in the step."""
        return self.weights.bytes + self.attention.bytes

    @property
    def flops(self) -> int:
        """All operations of the step."""
        return self.weights.flops + self.attention.flops


def attention(
    counts: Mapping[Role, int], shape: OpShape, kept: int, anchor_output: str = "pruned"
) -> Work:
    """All attention layers of a step, by how many there are of each role; not the model's own."""
    anchors = decode(shape, kept, anchor_output).times(counts.get(Role.ANCHOR, 0))
    followers = attend(shape, kept).times(counts.get(Role.FOLLOWER, 0))
    return dense(shape).times(counts.get(Role.DENSE, 0)).plus(anchors).plus(followers)


def role_counts(config: PulseConfig | None, full: Sequence[bool], step: int = 1) -> dict[Role, int]:
    """How many layers of each role a decode step has; without a config all are dense."""
    if config is None:
        return {Role.DENSE: sum(full), Role.MODEL: len(full) - sum(full)}
    roles = schedule.roles(config, full, step)
    return {role: roles.count(role) for role in Role}


def decode_step(
    decoder: Decoder,
    text: int,
    visual: int,
    *,
    rows: int = 1,
    config: PulseConfig | None = None,
    retention: float | None = None,
    itemsize: int = 2,
    step: int = 1,
) -> StepWork:
    """The work of one step; `config=None` is the dense model.

    `retention` is the share of visual tokens kept, by default the largest the config allows.
    `itemsize` is that of weights, queries and the cache, unless the config has `cache="fp8"`.
    Layers with sliding or linear attention are left out: their cost does not grow with the context.
    """
    heads = decoder.heads, decoder.kv_heads, decoder.head_dim
    shape = OpShape(rows, *heads, text, visual, itemsize, stored_itemsize(config))
    counts = role_counts(config, decoder.is_full, step)
    config = config or PulseConfig()  # counts have no sparse layer where there is none
    share = config.ratio[1] if retention is None else retention
    kept = min(visual, max(1, int(share * visual))) if visual else 0
    used = decoder.layers * (decoder.projections + decoder.active * decoder.one_ffn)
    operations = 2 * rows * (used + decoder.width * decoder.vocab)
    weights = Work(itemsize * decoder.weights(rows), 0, operations)
    return StepWork(weights, attention(counts, shape, kept, config.anchor_output))


def stored_itemsize(config: PulseConfig | None) -> int | None:
    """Bytes of an element of K and V, as `OpShape` takes them."""
    return 1 if config is not None and config.cache == "fp8" else None


class Roof(NamedTuple):
    """The measured limits of a machine."""

    read: float  # bytes/s in order
    compute: float  # operations/s
    gather: float | None = None  # bytes/s of rows at random places; None: as fast as in order


def predict(work: Work, roof: Roof) -> float:
    """The least seconds that an op takes: its memory time or its compute time, the longer one."""
    gather = roof.gather or roof.read
    memory = work.streamed / roof.read + work.gathered / gather
    return max(memory, work.flops / roof.compute)


def predict_step(step: StepWork, roof: Roof) -> float:
    """Seconds of a step: its weights, then its attention."""
    return predict(step.weights, roof) + predict(step.attention, roof)
