"""Each stage by itself, on cold layers: dense, score, select, anchor, follower.

    python benchmarks/bench_layers.py --shapes b1-8k,b1-32k --dtypes bf16,fp32 --out rows.jsonl

`follower` is the stage attend over text and kept tokens; `anchor` is the fused score, select and
attend. Every stage has its own baseline, the best plain torch form of the same work, and all
stages of a shape are one interleaved run.
"""

import argparse
from collections.abc import Callable

import baselines
import torch
from baselines import PLAIN, Form, attended_positions
from bench_decode import assert_heads, assert_selection, published, torch_anchor
from harness import Bench, launches_of
from shapes import SHAPES, Layers, Shape
from torch import Tensor

import visionpulse as vp
from visionpulse.analysis import cost

# stage: (its baseline, what that is)
BASELINES = {
    "dense": (PLAIN, "torch's attention, heads grouped"),
    "score": ("torch-score", "whole logits, two softmaxes, the mean over heads"),
    "select": ("torch-topk", "torch.topk, then sort"),
    "anchor": ("torch-visionpulse", "the three stages in torch"),
    "follower": (PLAIN, "copy the kept rows, then torch's attention"),
}
Variants = dict[str, Callable[[int], object]]


class Ours:
    """One backend's stages on the layers, checked when made."""

    def __init__(self, layers: Layers, backend: str) -> None:
        self.layers, self.config = layers, layers.shape.config()
        self.common = {"workspace": vp.Workspace(), "backend": backend}
        self.scored = [self.score(turn) for turn in range(len(layers))]
        out, self.selection = vp.decode(*layers.at(0), layers.visual, self.config, **self.common)
        assert_selection(layers, self.selection, self.config, backend)
        assert_heads(layers, 0, out, self.selection)
        assert_heads(layers, 1, self.follower(1), self.selection)
        assert_heads(layers, 1, self.dense(1), None)
        staged = self.select(0)
        assert torch.equal(staged.indices, self.selection.indices), "the stages select otherwise"

    def dense(self, turn: int) -> Tensor:
        return vp.attend(*self.layers.at(turn), **self.common)

    def score(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        return vp.score(*self.layers.at(turn), self.layers.visual, self.config, **self.common)

    def select(self, turn: int) -> vp.Selection:
        scores, mass, mean = self.scored[turn % len(self.scored)]
        visual = self.layers.visual
        return vp.select(scores, mass, visual, self.config, mass_mean=mean, **self.common)

    def anchor(self, turn: int) -> object:
        return vp.decode(*self.layers.at(turn), self.layers.visual, self.config, **self.common)

    def anchor_dense(self, turn: int) -> object:
        config = self.layers.shape.config(anchor_output="dense")
        return vp.decode(*self.layers.at(turn), self.layers.visual, config, **self.common)

    def follower(self, turn: int) -> Tensor:
        return vp.attend(*self.layers.at(turn), self.layers.visual, self.selection, **self.common)


def torch_score(layers: Layers) -> Callable[[int], object]:
    """Scores and mass as one writes them in torch, the visual tokens being one run."""
    shape, tau = layers.shape, layers.shape.config().tau
    begin = shape.text // 4
    visual = slice(begin, begin + shape.visual)

    def run(turn: int) -> tuple[Tensor, Tensor]:
        q, kv = layers.at(turn)
        folded = q.view(shape.rows, shape.kv_heads, -1, shape.head_dim)
        z = torch.matmul(folded, kv.k.transpose(2, 3)).float().flatten(1, 2) * shape.head_dim**-0.5
        mass = (z / tau).softmax(-1)[:, :, visual].sum(-1).amax(-1)
        return z.softmax(-1).mean(1)[:, visual], mass

    scores, mass = run(0)
    ours, our_mass, _ = vp.score(*layers.at(0), layers.visual, layers.shape.config())
    if layers.q[0].dtype == torch.float32:  # else torch rounds the logits, and may differ
        torch.testing.assert_close(scores, ours[:, visual])
        torch.testing.assert_close(mass, our_mass)
    return run


def torch_topk(layers: Layers, ours: Ours) -> Callable[[int], object]:
    def run(turn: int) -> Tensor:
        scores = ours.scored[turn % len(ours.scored)][0]
        return scores.topk(layers.shape.kept).indices.sort().values

    return run


def theirs(bench: Bench, layers: Layers, forms: list[Form], ours: Ours) -> dict[str, Variants]:
    """Baselines of every stage."""
    made: dict[str, Variants] = {stage: {} for stage in BASELINES}
    kept, many = attended_positions(layers.kv[0], layers.visual, ours.selection), len(layers)
    for form in forms:
        baselines.check(form.name, bench.device.type)
        if form.dense is not None:
            layer = lambda turn, form=form: form.dense(*layers.at(turn))  # noqa: E731
            made["dense"][form.name] = bench.captured_layers(layer, many, form.name)
        if form.sparse is not None:
            layer = lambda turn, form=form: form.sparse(*layers.at(turn), kept)  # noqa: E731
            made["follower"][form.name] = bench.captured_layers(layer, many, form.name)
    made["score"]["torch-score"] = bench.captured_layers(torch_score(layers), many)
    made["select"]["torch-topk"] = bench.captured_layers(torch_topk(layers, ours), many)
    made["anchor"]["torch-visionpulse"] = bench.captured_layers(torch_anchor(layers), many)
    scheme, config = published(bench.device), layers.shape.config()
    _, blocks = scheme.anchor(*layers.at(0), layers.visual, config)
    # never a graph: the published scheme reads the device, and that is part of its cost
    name = "published-block64"
    made["dense"][name] = lambda turn: scheme.dense(*layers.at(turn))
    made["anchor"][name] = lambda turn: scheme.anchor(*layers.at(turn), layers.visual, config)
    made["follower"][name] = lambda turn: scheme.follower(*layers.at(turn), blocks)
    return made


def works(shape: Shape, dtype: torch.dtype) -> dict[str, cost.Work]:
    """What each stage must move."""
    problem = shape.cost(dtype)
    return {
        "dense": cost.dense(problem),
        "score": cost.score(problem),
        "select": cost.select(problem, shape.kept),
        "anchor": cost.decode(problem, shape.kept),
        "anchor-dense-output": cost.decode(problem, shape.kept, "dense"),
        "follower": cost.attend(problem, shape.kept),
    }


def run(bench: Bench, shape: Shape, dtype: torch.dtype) -> None:
    layers = Layers.make(shape, dtype, bench.device, 36, bench.options.budget << 20)
    forms = baselines.usable(bench.options.baselines, bench.device, dtype, bench.say)
    stages: dict[str, Variants] = {stage: {} for stage in BASELINES}
    eager: dict[str, Callable[[int], object]] = {}
    for backend in bench.backends(*layers.at(0), layers.visual):
        ours = Ours(layers, backend)
        for stage in stages:
            eager[f"{stage}/{backend}"] = getattr(ours, stage)
        eager[f"anchor/{backend}:dense-output"] = ours.anchor_dense
    for key, layer in eager.items():
        stage, name = key.split("/")
        stages[stage][name] = bench.captured_layers(layer, len(layers))
    for stage, variants in theirs(bench, layers, forms, ours).items() if forms else ():
        stages[stage] |= variants
    flat = {f"{stage}/{name}": v for stage, made in stages.items() for name, v in made.items()}
    times, ceilings = bench.time(flat, dtype, shape.head_dim * dtype.itemsize)
    work = works(shape, dtype)
    for stage, made in stages.items():
        of = {
            name: work["anchor-dense-output" if name.endswith(":dense-output") else stage]
            for name in made
        }
        facts = {
            name: {
                "visual": shape.visual,
                "retention": shape.retention,
                "flops": w.flops,
                "predicted_us": round(1e6 * cost.predict(w, ceilings.cost()), 1),
            }
            for name, w in of.items()
        }
        launches = {
            name: launches_of(lambda key=f"{stage}/{name}": eager[key](0), bench.device)
            for name in made
            if f"{stage}/{name}" in eager
        }
        bench.add(
            stage, shape.name, dtype, {name: times[f"{stage}/{name}"] for name in made}, ceilings,
            baseline=BASELINES[stage][0], facts=facts, launches=launches,
            bytes_={name: w.bytes for name, w in of.items()},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench = Bench(parser, shapes="b1-8k", dtypes="bf16")
    for name in bench.options.shapes.split(","):
        for dtype in bench.dtypes:
            run(bench, SHAPES[name], dtype)
    bench.finish()


if __name__ == "__main__":
    main()
