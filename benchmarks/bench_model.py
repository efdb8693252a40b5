"""Whole decode steps of a patched model against the unpatched one, and what patching costs.

    python benchmarks/bench_model.py --shapes b1-8k --dtypes bf16 --out rows.jsonl
    python benchmarks/bench_model.py --model full --weights int8 --shapes b1-8k  # with its weights

The model has the attention of Qwen3-VL-4B (32 heads, 8 KV heads, head dim 128), random weights, and
a cache filled with random keys. `--model thin` has thin projections: a step is attention and
Python. `--model full` has the real widths and vocabulary; `--distinct` layers have weights of their
own, which the others share in turn. `--weights` packs them for torch's 8-bit or 4-bit CPU kernels.

`model-step` rows time a whole step, with the tokens per second that follow, `model-attention` rows
the sum of its attention calls (on a CPU: a GPU runs behind the host), `model-prefill` a prompt of
`--prefill` visual tokens. The unpatched model has a static cache; its best implementation is the
baseline. `model-overhead` is the CPU time of a step of a model so small that Python is nearly all.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from harness import Bench
from model_weights import PACKINGS, pack, repeat_layers
from shapes import SHAPES, Shape
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import visionpulse as vp
from visionpulse.bench.timing import Times
from visionpulse.models.attention import attention
from visionpulse.models.kv_layers import attach, swap_layers
from visionpulse.models.layer_roles import LayerRoles

IMAGE = 9
REFRESH = 8  # steps of one turn of "lookback": one of them is dense
OURS = {
    "ours:dense": {"schedule": "dense"},
    "ours:paper": {},
    "ours:paper-1%": {"retention": 0.01},
    "ours:lookback": {"schedule": "lookback", "refresh": 0},
    "ours:lookback-refresh-8": {"schedule": "lookback", "refresh": REFRESH},
}
THEIRS = ("transformers:sdpa", "transformers:eager")
AS_DTYPE = "unpacked"
LAYERS = 36  # of the models that the paper publishes
WIDTHS = {"thin": (256, 256, 256), "full": (2560, 9728, 151936)}  # hidden, feed-forward, vocabulary


def model_of(
    layers: int, dtype: torch.dtype, *, heads: int = 32, dim: int = 128,
    widths: tuple[int, int, int] = WIDTHS["thin"], device: torch.device | str = "cpu",
    distinct: int = 0,
):  # fmt: skip
    """Qwen3-VL with these widths, a minimal vision tower, and random weights."""
    width, inner, vocabulary = widths
    text = {
        "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": min(layers, distinct or layers),
        "num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": dim,
        "vocab_size": vocabulary, "max_position_embeddings": 1 << 20,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [dim // 8, dim // 8 * 3 // 2, dim // 8 * 3 // 2],
        },
    }  # fmt: skip
    vision = {
        "depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32,
        "out_hidden_size": width, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = AutoConfig.for_model(
        "qwen3_vl", text_config=text, vision_config=vision, image_token_id=IMAGE
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    repeat_layers(model, layers)
    return model


class Timed:
    """An attention function whose calls are added up."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: object, **kwargs: object) -> object:
        begin = time.perf_counter()
        out = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - begin
        return out


class Run:
    """The variants of one shape: two models with the same weights, caches with the same keys."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, steps: int, backend: str,
        options: argparse.Namespace,
    ) -> None:  # fmt: skip
        self.shape, self.device, layers = shape, device, options.layers
        widths, budget = WIDTHS[options.model], options.budget << 20
        self.ours, self.theirs = (
            model_of(layers, dtype, widths=widths, device=device, distinct=options.distinct)
            for _ in range(2)
        )
        self.theirs.load_state_dict(self.ours.state_dict(), assign=True)  # one copy of the weights
        if options.weights != AS_DTYPE:
            pack((self.ours, self.theirs), options.weights)
        self.session = vp.patch(self.ours, shape.config(backend=backend))
        self.token = torch.full((shape.rows, 1), 7, device=device)
        slots = shape.keys + steps
        distinct = max(2, min(layers, budget // shape.cache_bytes(dtype)))
        size = (shape.rows, shape.kv_heads, slots, shape.head_dim)
        # layers share buffers in turn, so many that none is still in a cache
        buffers = [
            tuple(torch.randn(size, dtype=dtype, device=device) for _ in "kv")
            for _ in range(distinct)
        ]
        text = self.ours.config.get_text_config()
        self.growing = DynamicCache(config=text)
        swap_layers(self.growing, layers)
        self.static = StaticCache(config=text, max_cache_len=slots)
        for i, (grown, fixed) in enumerate(
            zip(self.growing.layers, self.static.layers, strict=True)
        ):
            k, v = buffers[i % distinct]
            one = k[:, :, :1]
            grown.lazy_initialization(one, one)
            grown._buffers = (k, v)
            grown.show(shape.keys)
            fixed.lazy_initialization(one[:0], one[:0])
            fixed.keys, fixed.values = k, v
            fixed.cumulative_length.fill_(shape.keys)
        mask = self.mask(shape.visual)
        self.roles, self.conversations = {}, {}
        for name, changes in OURS.items():
            keep_all = changes.get("schedule") == "dense"
            config = config_of(shape, ({} if keep_all else changes) | {"backend": backend})
            self.roles[name] = LayerRoles.of(config, self.session.anatomy)
            conversation = self.session.patched.new_conversation()
            conversation.set_visual(None if keep_all else vp.VisualTokens.from_mask(mask))
            self.conversations[name] = conversation
        attach(self.growing, 0, self.conversations["ours:paper"])
        self._register()

    def mask(self, visual: int) -> torch.Tensor:
        """A system prompt, the picture, the question."""
        text = self.shape.text
        mask = torch.zeros(self.shape.rows, text + visual, dtype=torch.bool, device=self.device)
        mask[:, text // 4 : text // 4 + visual] = True
        return mask

    def _register(self) -> None:
        self.timed = {"visionpulse": Timed(attention)}
        AttentionInterface.register("visionpulse", self.timed["visionpulse"])
        for name in THEIRS:
            plain = name.partition(":")[2]
            home = type(self.theirs.get_decoder().layers[0].self_attn).__module__
            eager = getattr(__import__(home, fromlist=["x"]), "eager_attention_forward")  # noqa: B009
            function = AttentionInterface._global_mapping.get(plain, eager)
            self.timed[plain] = Timed(function)
            AttentionInterface.register(f"timed_{plain}", self.timed[plain])
            AttentionMaskInterface.register(f"timed_{plain}", ALL_MASK_ATTENTION_FUNCTIONS[plain])

    def step(self, name: str) -> torch.Tensor:
        """One decode step of a variant."""
        if name in OURS:
            self.session.patched.layer_roles = self.roles[name]
            self.growing.layers[0].visionpulse = self.conversations[name]
            return self.ours(input_ids=self.token, past_key_values=self.growing).logits
        plain = f"timed_{name.partition(':')[2]}"
        self.theirs.get_decoder().config._attn_implementation_internal = plain
        return self.theirs(input_ids=self.token, past_key_values=self.static).logits

    def variant(self, name: str, spent: dict[str, list[float]]) -> Callable[[int], object]:
        """Time a turn of a variant; the sum of its attention goes to `spent`."""
        timed = self.timed["visionpulse" if name in OURS else name.partition(":")[2]]
        count = turns(name)

        def turn(number: int) -> None:
            timed.seconds = 0.0
            for _ in range(count):
                self.step(name)
            spent.setdefault(name, []).append(timed.seconds)

        return turn

    def check(self) -> None:
        """Check the dense step against the model's own."""
        logits = {name: self.step(name) for name in (*THEIRS, "ours:dense")}
        assert_near(logits, "ours:dense")
        for layer in self.static.layers:
            layer.cumulative_length.sub_(2)
        self.growing.crop(-1)

    def prefills(self, visual: int) -> dict[str, Callable[[int], torch.Tensor]]:
        """A prompt through both models, into a cache of its own each time."""
        mask = self.mask(visual)
        width = self.ours.config.get_text_config().hidden_size
        embeds = torch.randn(*mask.shape, width, dtype=self.ours.dtype, device=self.device)

        def ours(turn: int) -> torch.Tensor:
            self.session.patched.layer_roles = self.roles["ours:paper"]
            self.session.set_visual_mask(mask)
            cache = DynamicCache(config=self.ours.config.get_text_config())
            return self.ours.get_decoder()(inputs_embeds=embeds, past_key_values=cache)[0]

        def theirs(name: str) -> torch.Tensor:
            decoder = self.theirs.get_decoder()
            decoder.config._attn_implementation_internal = f"timed_{name.partition(':')[2]}"
            cache = DynamicCache(config=self.theirs.config.get_text_config())
            return decoder(inputs_embeds=embeds, past_key_values=cache)[0]

        made = {name: lambda turn, name=name: theirs(name) for name in THEIRS}
        return {"ours:paper": ours, **made}


def assert_near(outputs: dict[str, torch.Tensor], ours: str) -> None:
    """Ours lies no further from the model's own than its implementations from each other."""
    sdpa, eager, own = (outputs[name].float() for name in (*THEIRS, ours))
    apart, off = (sdpa - eager).abs().max(), (own - eager).abs().max()
    ulp = torch.finfo(outputs[ours].dtype).eps * eager.abs().max()
    assert off <= 2 * (apart + ulp), f"{ours} is {off} off, theirs are {apart} apart"


def config_of(shape: Shape, changes: dict) -> vp.PulseConfig:
    changes = dict(changes)
    kept = changes.pop("retention", shape.retention)
    return replace(shape, retention=kept).config(**changes)


def turns(name: str) -> int:
    return REFRESH if name.endswith("refresh-8") else 1


def run(bench: Bench, shape: Shape, dtype: torch.dtype, options: argparse.Namespace) -> None:
    names = [*OURS, *(() if shape.visual > options.theirs_up_to else THEIRS)]
    row_bytes, steps = shape.head_dim * dtype.itemsize, (options.rounds + 1) * 12 + 8
    # one that is named is obeyed; of several the model takes what it would by itself
    backend = "auto" if "," in options.backends else options.backends or "auto"
    with torch.inference_mode(), warnings.catch_warnings():
        # a step that was meant to prune and did not is no row
        warnings.filterwarnings("error", "visionpulse prunes nothing")
        made = Run(shape, dtype, bench.device, steps, backend, options)
        if len(names) > len(OURS):
            made.check()
        spent: dict[str, list[float]] = {}
        variants = {name: made.variant(name, spent) for name in names}
        times, ceilings = bench.time(variants, dtype, row_bytes)
    scaled = {name: 1 / turns(name) for name in names}
    facts = {
        name: {
            "model": options.model, "layers": options.layers, "visual": shape.visual,
            "distinct_layers": options.distinct or options.layers, "weights": options.weights,
            "retention": OURS.get(name, {}).get("retention", shape.retention),
            "tokens_s": round(shape.rows / (times[name].best * scaled[name]), 2),
        }
        for name in names
    }  # fmt: skip
    whole = {name: times[name] for name in names}
    theirs = [name for name in names if name in THEIRS]
    best = min(theirs, key=lambda name: whole[name].best, default="ours:dense")
    kind = kind_of(options)
    shared = {"scaled": scaled, "facts": facts}
    bench.add(f"model-step{kind}", shape.name, dtype, whole, ceilings, baseline=best, **shared)
    if bench.device.type == "cpu":
        parts = {name: Times(tuple(sorted(spent[name][1:]))) for name in names}  # 1 warmed up
        bench.add(
            f"model-attention{kind}", shape.name, dtype, parts, ceilings, baseline="ours:dense",
            **shared,
        )  # fmt: skip
    if options.prefill:
        prefill(bench, made, dtype, options)
    made.session.unpatch()


def kind_of(options: argparse.Namespace) -> str:
    """What the rows of another model or other weights are called by."""
    parts = (options.model if options.model != "thin" else "",
             options.weights if options.weights != AS_DTYPE else "")  # fmt: skip
    return "".join(f"-{part}" for part in parts if part)


def prefill(bench: Bench, made: Run, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """A prompt, apart from the steps: patching must not cost anything there."""
    with torch.inference_mode():
        variants = made.prefills(options.prefill)
        assert_near({name: variant(0) for name, variant in variants.items()}, "ours:paper")
        times, ceilings = bench.time(variants, dtype, made.shape.head_dim * dtype.itemsize)
    times = {name: times[name] for name in variants}
    tokens = made.shape.rows * (options.prefill + made.shape.text)
    facts = {
        name: {
            "model": options.model, "layers": options.layers, "visual": options.prefill,
            "distinct_layers": options.distinct or options.layers, "weights": options.weights,
            "tokens_s": round(tokens / times[name].best, 1),
        }
        for name in times
    }  # fmt: skip
    shape = f"b{made.shape.rows}-{options.prefill}"
    bench.add(
        f"model-prefill{kind_of(options)}", shape, dtype, times, ceilings, baseline=THEIRS[0],
        facts=facts,
    )  # fmt: skip


def overhead(bench: Bench, layers: int, rounds: int = 300) -> None:
    """CPU time that patching adds to a step, per layer; paired, so that the machine cancels."""
    names = ["unpatched", *OURS]
    models = {
        name: model_of(layers, torch.float32, heads=4, widths=(32, 32, 256), dim=16)
        for name in names
    }
    caches, spent = {}, {name: [] for name in names}
    prompt = torch.full((1, 40), 5)
    prompt[:, 4:36] = IMAGE
    with torch.inference_mode():
        for name, model in models.items():
            caches[name] = DynamicCache(config=model.config.get_text_config())
            if name in OURS:
                keep_all = OURS[name].get("schedule") == "dense"
                changes = {} if keep_all else dict(OURS[name])
                kept = changes.pop("retention", None)
                session = vp.patch(model, **changes, **({"ratio": (kept, kept)} if kept else {}))
                if not keep_all:
                    session.set_visual_mask(prompt == IMAGE)
            embeds = model.get_input_embeddings()(prompt)
            model.get_decoder()(inputs_embeds=embeds, past_key_values=caches[name])
        token = torch.tensor([[7]])
        for _ in range(rounds):
            for name, model in models.items():
                begin = time.thread_time()
                model(input_ids=token, past_key_values=caches[name])
                spent[name].append(time.thread_time() - begin)
    ceilings = bench.time({}, torch.float32, 64)[1]
    times, facts = {}, {}
    for name in names:
        pairs = zip(spent[name], spent["unpatched"], strict=True)
        added = statistics.median(a - b for a, b in pairs) / layers
        facts[name] = {"layers": layers, "added_us_per_layer": round(added * 1e6, 2)}
        times[name] = Times(tuple(sorted(spent[name])))
        bench.say(f"{name:<26} {added * 1e6:7.2f} us of CPU time added per layer and step")
    bench.add(
        "model-overhead", "tiny", torch.float32, times, ceilings, baseline="unpatched", facts=facts
    )
    for name, model in models.items():
        if name in OURS:
            vp.unpatch(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--model", choices=WIDTHS, default="thin")
    parser.add_argument("--distinct", type=int, default=0, help="layers with weights of their own")
    parser.add_argument("--weights", choices=(AS_DTYPE, *PACKINGS), default=AS_DTYPE)
    parser.add_argument("--prefill", type=int, default=0, help="visual tokens of a prompt to time")
    parser.add_argument("--no-overhead", action="store_true", help="leave the overhead rows out")
    parser.add_argument(
        "--theirs-up-to", type=int, default=8192, help="visual tokens the unpatched model is given"
    )
    bench = Bench(parser, shapes="b1-8k,b1-32k", dtypes="bf16")
    options = bench.options
    for shape in filter(None, options.shapes.split(",")):
        for dtype in bench.dtypes:
            with bench.part(shape):
                run(bench, SHAPES[shape], dtype, options)
    if not options.no_overhead:
        with bench.part("overhead"):
            overhead(bench, options.layers)
    bench.finish()


if __name__ == "__main__":
    main()
