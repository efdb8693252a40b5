"""Rounds of lossless decoding: their Python, and their speed over our dense steps.

    python benchmarks/bench_lossless.py --shapes b1-32k --dtypes bf16 --out rows.jsonl

`lossless-round` is the CPU time of a round less that of its forwards: what a call of the model
takes beside them, summed over the tokens of the round. The model is so small that its forwards are
Python too; one of them is the baseline.

`lossless-step` is a token of a thin model with the attention of Qwen3-VL-4B, each drafted token
accepted, beside a dense step of it; `facts.predicted` is what the cost model makes of the parts,
which the same run measures alone.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_model import IMAGE, LAYERS, model_of
from harness import Bench
from shapes import SHAPES, Layers, Shape
from transformers import DynamicCache

import visionpulse as vp
from visionpulse.bench import drafts
from visionpulse.bench.timing import Times
from visionpulse.models.draft_policy import DraftPolicy, FixedDraft
from visionpulse.models.kv_layers import attach

TOKEN = 7
DRAFTED = (1, 3, 7)
WAYS = {"4 drafted": 4, "8 drafted": 8, "auto, 15 drafted": "auto"}


class Forwards:
    """A model's forward whose CPU time is added up."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.seconds, self.calls = forward, 0.0, 0

    def __call__(self, **named: Any) -> Any:
        begin = time.thread_time()
        out = self.forward(**named)
        self.seconds += time.thread_time() - begin
        self.calls += 1
        return out


class Caller:
    """Decodes as `generate()` does, and says what was drafted, so that every token is accepted."""

    def __init__(self, model: Any, cache: DynamicCache, session: vp.Session) -> None:
        self.model, self.cache, self.ahead = model, cache, session._ahead
        self.keys = cache.get_seq_length()
        self.mask = torch.ones(1, self.keys + (1 << 14), dtype=torch.long)

    def token(self) -> float:
        """One call of the model, of a round's token."""
        held, length = self.ahead._ahead, self.cache.get_seq_length()
        token = TOKEN
        if held.served < held.plan.tokens:
            drafted = held.drafted  # a tensor with the first token, until the first is asked for
            later = drafted[held.served] if isinstance(drafted, list) else drafted[0, 1]
            token = int(later)
        named = {
            "input_ids": torch.tensor([[token]]), "attention_mask": self.mask[:, : length + 1],
            "position_ids": torch.full((3, 1, 1), length), "past_key_values": self.cache,
            "use_cache": True, "return_dict": True, "logits_to_keep": 1,
        }  # fmt: skip
        begin = time.thread_time()
        self.model(**named)
        return time.thread_time() - begin

    def round(self) -> float:
        """The calls of one round; their CPU time."""
        seconds = self.token()
        while self.ahead._ahead.served < self.ahead._ahead.plan.tokens:
            seconds += self.token()
        return seconds


def tiny_caller(draft: int | str, keys: int, layers: int) -> Caller:
    """A model whose forwards are Python, behind a prompt of `keys` tokens."""
    model = model_of(layers, torch.float32, heads=4, widths=(32, 32, 256), dim=16)
    session = vp.patch(model, lossless=True, draft=draft)
    prompt = torch.full((1, keys), 5)
    prompt[:, 4:36] = IMAGE
    session.set_visual_mask(prompt == IMAGE)
    cache = DynamicCache(config=model.config.get_text_config())
    embeds = model.get_input_embeddings()(prompt)
    model.get_decoder()(inputs_embeds=embeds, past_key_values=cache)
    if draft == "auto":  # costs under which it drafts most
        session._ahead.plan()
        policy = session._ahead.policy
        tell = DraftPolicy.time
        policy.time = lambda plan, *seconds: tell(policy, plan, 1e-6 * plan.tokens, 1e-3)
    return Caller(model, cache, session)


def overhead(bench: Bench, keys: int, layers: int, rounds: int) -> None:
    """Rows of the Python of a round."""
    with torch.inference_mode():
        callers = {name: tiny_caller(draft, keys, layers) for name, draft in WAYS.items()}
        spent: dict[str, list[float]] = {name: [] for name in callers}
        inside: dict[str, list[float]] = {name: [] for name in callers}
        for number in range(rounds + 20):
            for name, caller in callers.items():
                forwards = Forwards(caller.ahead.plain)
                caller.ahead.plain = forwards
                seconds = caller.round() - forwards.seconds
                caller.ahead.plain = forwards.forward
                if number >= 20:  # the first try every way to draft
                    spent[name].append(seconds)
                    inside[name].append(forwards.seconds / forwards.calls)
        ceilings = bench.time({}, torch.float32, 64)[1]
    times = {name: Times(tuple(sorted(each))) for name, each in spent.items()}
    times["one forward"] = Times(tuple(sorted(inside["4 drafted"])))
    for name, taken in times.items():
        bench.say(f"{name:<20} {1e6 * taken.best:8.1f} us of CPU time, {keys} keys")
    facts = {name: {"layers": layers, "keys": keys} for name in times}
    bench.add(
        "lossless-round", f"tiny-{keys}", torch.float32, times, ceilings, baseline="one forward",
        facts=facts,
    )  # fmt: skip
    for caller in callers.values():
        vp.unpatch(caller.model)


def looking_back(shape: Shape) -> vp.PulseConfig:
    """Drafts whose layers are all sparse."""
    return shape.config(schedule="lookback", refresh=0)


class Thin:
    """Whole steps and rounds of a thin model, behind random keys."""

    def __init__(self, shape: Shape, dtype: torch.dtype, layers: Layers, count: int) -> None:
        model = model_of(count, dtype)
        self.session = vp.patch(model, looking_back(shape), lossless=True, draft=1)
        cache = DynamicCache(config=model.config.get_text_config())
        self.session.patched.swap_layers(cache)
        slots = 64
        for i, layer in enumerate(cache.layers):
            kv = layers.kv[i % len(layers)]
            layer.lazy_initialization(kv.k[:, :, :1], kv.v[:, :, :1])
            layer._buffers = kv.k, kv.v
            layer.show(shape.keys - slots)
        self.start = shape.keys - slots
        conversation = self.session.patched.new_conversation()
        conversation.set_visual(layers.visual)
        attach(cache, 0, conversation)
        self.caller = Caller(model, cache, self.session)

    def tokens(self, draft: int, rounds: int = 1) -> None:
        """Rounds of so many drafted tokens, all accepted; 0 is dense steps."""
        caller = self.caller
        caller.ahead.policy = FixedDraft(draft)
        for layer in caller.cache.layers:
            layer.end_with(self.start)
        for _ in range(rounds):
            caller.round()


def steps(bench: Bench, shape: Shape, dtype: torch.dtype) -> None:
    """Rows of a token, by how many a round drafts, over a dense step."""
    options = bench.options
    layers = Layers.make(shape, dtype, bench.device, options.layers, options.budget << 20)
    with torch.inference_mode():
        thin = Thin(shape, dtype, layers, options.layers)
        thin.tokens(2)  # the kept selection is that of another step from now on
        parts = kernels(shape, layers)
        variants = {
            "ours:dense": lambda turn: thin.tokens(0),
            **{f"ours:{g} drafted": lambda turn, g=g: thin.tokens(g) for g in DRAFTED},
            **{f"part:{name}": part for name, part in parts.items()},
        }
        times, ceilings = bench.time(variants, dtype, shape.head_dim * dtype.itemsize)
    dense = options.layers * times["part:dense"].best
    draft = times["part:anchor"].best + (options.layers - 1) * times["part:follower"].best
    weights = times["ours:dense"].best - dense  # and whatever else a step does
    scaled, facts = {"ours:dense": 1.0}, {"ours:dense": {}}
    for g in DRAFTED:
        check = options.layers * times[f"part:{g + 1}-queries"].best
        cost = drafts.RoundCost(lambda n: weights, dense, draft, lambda n, c=check: c)
        scaled[f"ours:{g} drafted"] = 1 / (g + 1)
        facts[f"ours:{g} drafted"] = {"predicted": round(cost.speed(1.0, g), 3)}
    for name in facts:
        facts[name] |= {
            "model": "thin", "layers": options.layers, "visual": shape.visual,
            "attention_over_weights": round(dense / weights, 2), "retention": shape.retention,
        }  # fmt: skip
    bench.add(
        "lossless-step", shape.name, dtype, {name: times[name] for name in facts}, ceilings,
        baseline="ours:dense", scaled=scaled, facts=facts,
    )  # fmt: skip
    vp.unpatch(thin.caller.model)


def kernels(shape: Shape, layers: Layers) -> dict[str, Callable[[int], object]]:
    """The attention of one layer of a dense step, of a draft, and of each check."""
    generator = torch.Generator().manual_seed(1)
    workspace, config = vp.Workspace(), looking_back(shape)

    def queries(count: int) -> torch.Tensor:
        size = (shape.rows, count, shape.heads, shape.head_dim)
        return torch.randn(size, generator=generator).to(layers.kv[0].k.dtype)

    def dense(q: torch.Tensor) -> Callable[[int], object]:
        return lambda turn: vp.attend(q, layers.at(turn)[1], workspace=workspace)

    def anchor(turn: int) -> object:
        q, kv = layers.at(turn)
        return vp.decode(q, kv, layers.visual, config, workspace=workspace)

    _, kept = vp.decode(*layers.at(0), layers.visual, config)

    def follower(turn: int) -> object:
        q, kv = layers.at(turn)
        return vp.attend(q, kv, layers.visual, kept, workspace=workspace)

    checks = {f"{g + 1}-queries": dense(queries(g + 1)) for g in DRAFTED}
    alone = dense(queries(1)[:, 0])
    return {"dense": alone, "anchor": anchor, "follower": follower, **checks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--keys", default="512,8192", help="of the rows of Python, by comma")
    parser.add_argument("--round-rounds", type=int, default=100, help="of the rows of Python")
    bench = Bench(parser, shapes="b1-32k", dtypes="bf16")
    for shape in filter(None, bench.options.shapes.split(",")):
        for dtype in bench.dtypes:
            with bench.part(shape):
                steps(bench, SHAPES[shape], dtype)
    for keys in filter(None, bench.options.keys.split(",")):
        with bench.part(f"{keys} keys"):
            overhead(bench, int(keys), bench.options.layers, bench.options.round_rounds)
    bench.finish()


if __name__ == "__main__":
    main()
