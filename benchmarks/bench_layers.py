"""Each stage by itself, on cold layers: dense, score, select, anchor, follower.

    python benchmarks/bench_layers.py --shapes b1-8k,b1-32k --dtypes bf16,fp32 --out rows.jsonl
    python benchmarks/bench_layers.py --goals --dtypes bf16,fp32     # exit 1 where a ratio is short

`follower` is the stage attend over text and kept tokens; `anchor` is the fused score, select and
attend. Both, and `dense`, are called as a patched model's layers do: arguments were checked once.
Every stage has its own baseline, the best plain torch form of the same work, and all
stages of a shape are one interleaved run. A shape that ends in `-fp8` has a cache of 8 bits; beside
it ours (`cpu:wide`) and the baselines read the same numbers in the dtype of q.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial

import baselines
import torch
from baselines import PLAIN, Form, attended_positions
from bench_decode import (
    PUBLISHED,
    published_layers,
    torch_anchor,
)
from goals import FOLLOWER_GATHER, GATHER, PAGES, READ, SCALE, WIDE, judged
from harness import ONE_THREAD, Bench, launches_of
from shapes import GOAL_SHAPES, SHAPES, Layers, Shape
from torch import Tensor

import visionpulse as vp
from visionpulse._native import module
from visionpulse.backends import get, names
from visionpulse.bench import cost
from visionpulse.bench.ceilings import PAGES_AHEAD
from visionpulse.bench.check import check_output, check_selection
from visionpulse.bench.paged import in_pages
from visionpulse.bench.timing import OncePerStep, Times
from visionpulse.layer_ops import LayerOps

# stage: (its baseline, what that is)
BASELINES = {
    "dense": (PLAIN, "torch's attention, heads grouped"),
    "score": ("torch-score", "whole logits, two softmaxes, the mean over heads"),
    "select": ("torch-topk", "torch.topk, then sort"),
    "anchor": ("torch-visionpulse", "the three stages in torch"),
    "follower": (PLAIN, "copy the kept rows, then torch's attention"),
}
PAGED_LAYERS = 2  # one behind the other, as contiguous ones
SCORING = ("score", "anchor", "anchor_dense")
Variants = dict[str, Callable[[int], object]]


class Paged:
    """Ours over pages of the first layers, checked: the bits are those of contiguous caches."""

    def __init__(self, layers: Layers, page: int, contiguous: Callable[[int], Tensor]) -> None:
        self.layers = [(q, in_pages(kv, page)) for q, kv in map(layers.at, range(PAGED_LAYERS))]
        self.ops = LayerOps(*self.layers[0], None, vp.PulseConfig(backend="cpu"))
        self.workspace = vp.Workspace()
        for turn in range(PAGED_LAYERS):
            assert torch.equal(self(turn), contiguous(turn)), f"pages of {page} give other bits"

    def __call__(self, turn: int) -> Tensor:
        return self.ops.attend(*self.layers[turn % PAGED_LAYERS], None, None, self.workspace)

    def memory(self, turn: int) -> list[Tensor]:
        """What a turn reads."""
        q, kv = self.layers[turn % PAGED_LAYERS]
        return [q, kv.k_data]


def stream_read(layers: Layers, pages: int) -> Callable[[int], object]:
    """K and V of the turn's layer read once by the widest loads there are, `pages` asked ahead."""
    read = module().cpu.read_stream

    def run(turn: int) -> None:
        kv = layers.at(turn)[1]
        for tensor in (kv.k, kv.v):
            size = tensor.numel() * tensor.itemsize
            read(tensor.data_ptr(), size, pages, torch.get_num_threads())

    return run


class Ours:
    """One backend's stages on the layers, called as a patched model does; checked when made."""

    def __init__(self, layers: Layers, backend: str) -> None:
        self.layers, self.config = layers, layers.shape.config(backend=backend)
        self.common = {"workspace": vp.Workspace(), "backend": backend}
        self.workspace = self.common["workspace"]
        self.ops, self.ops_of_dense_output = (
            LayerOps(*layers.at(0), layers.visual, config)
            for config in (self.config, replace(self.config, anchor_output="dense"))
        )
        self.scored = [self.score(turn) for turn in range(len(layers))]
        out, self.selection = self.anchor(0)
        check_selection(layers, self.selection, self.config, backend)
        check_output(layers, 0, out, self.selection, backend)
        check_output(layers, 1, self.follower(1), self.selection, backend)
        check_output(layers, 1, self.dense(1), None, backend)
        staged = self.select(0)
        assert torch.equal(staged.indices, self.selection.indices), "the stages select otherwise"

    def timed(self, stage: str) -> Callable[[int], object]:
        """The stage, as cold as a step finds it."""
        call = getattr(self, stage)
        return OncePerStep(call, self.workspace) if stage in SCORING else call

    def dense(self, turn: int) -> Tensor:
        return self.ops.attend(*self.layers.at(turn), None, None, self.workspace)

    def score(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        return vp.score(*self.layers.at(turn), self.layers.visual, self.config, **self.common)

    def select(self, turn: int) -> vp.Selection:
        scores, mass, mean = self.scored[turn % len(self.scored)]
        visual = self.layers.visual
        return vp.select(scores, mass, visual, self.config, mass_mean=mean, **self.common)

    def anchor(self, turn: int) -> tuple[Tensor, vp.Selection]:
        return self.ops.decode(*self.layers.at(turn), self.layers.visual, self.workspace)

    def anchor_dense(self, turn: int) -> tuple[Tensor, vp.Selection]:
        ops = self.ops_of_dense_output
        return ops.decode(*self.layers.at(turn), self.layers.visual, self.workspace)

    def follower(self, turn: int) -> Tensor:
        visual = self.layers.visual
        return self.ops.attend(*self.layers.at(turn), visual, self.selection, self.workspace)


def torch_score(layers: Layers, ours: Ours) -> Callable[[int], object]:
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
    our_scores, our_mass, _ = ours.scored[0]
    if layers.q[0].dtype == torch.float32:  # else torch rounds the logits, and may differ
        torch.testing.assert_close(scores, our_scores[:, visual])
        torch.testing.assert_close(mass, our_mass)
    return run


def torch_topk(layers: Layers, ours: Ours) -> Callable[[int], object]:
    def run(turn: int) -> Tensor:
        scores = ours.scored[turn % len(ours.scored)][0]
        return scores.topk(layers.shape.kept).indices.sort().values

    return run


def theirs(bench: Bench, layers: Layers, forms: list[Form], ours: Ours) -> dict[str, Variants]:
    """Baselines of every stage; one that cannot run here is left out, and named as missing."""
    kept, many = attended_positions(layers.kv[0], layers.visual, ours.selection), len(layers)
    wanted: dict[str, Callable[[], Callable[[int], object]]] = {}

    def graphs(stage: str, name: str, make: Callable[[], Callable[[int], object]]) -> None:
        wanted[f"{stage}/{name}"] = lambda: bench.captured_layers(make(), many, name)

    for form in forms:
        if form.dense is not None:
            dense = lambda turn, form=form: form.dense(*layers.at(turn))  # noqa: E731
            graphs("dense", form.name, lambda dense=dense: dense)
        if form.sparse is not None:
            sparse = lambda turn, form=form: form.sparse(*layers.at(turn), kept)  # noqa: E731
            graphs("follower", form.name, lambda sparse=sparse: sparse)
    graphs("score", "torch-score", lambda: torch_score(layers, ours))
    graphs("select", "torch-topk", lambda: torch_topk(layers, ours))
    graphs("anchor", "torch-visionpulse", lambda: torch_anchor(layers))
    # never a graph: the published scheme reads the device, and that is part of its cost
    scheme = cache(lambda: published_layers(bench, layers))
    published = ("dense", "anchor", "follower") if bench.options.goals is None else ()
    for stage in published:  # its copies of K and V for every head are large at the goals' shapes
        wanted[f"{stage}/{PUBLISHED}"] = lambda stage=stage: scheme()[stage]
    made: dict[str, Variants] = {stage: {} for stage in BASELINES}
    for key, variant in bench.baselines(wanted)[0].items():
        stage, name = key.split("/")
        made[stage][name] = variant
    return made


def works(shape: Shape, dtype: torch.dtype) -> dict[str, cost.Work]:
    """What each stage must move."""
    problem = shape.cost(dtype)
    made = {
        READ: cost.Work(problem.cache_bytes, 0, 0),
        "dense": cost.dense(problem),
        "score": cost.score(problem),
        "select": cost.select(problem, shape.kept),
        "anchor": cost.decode(problem, shape.kept),
        "anchor-dense-output": cost.decode(problem, shape.kept, "dense"),
        "follower": cost.attend(problem, shape.kept),
    }
    if shape.cache == "model":
        return made
    wide = works(replace(shape, cache="model"), dtype)
    return made | {f"{stage}{WIDE}": work for stage, work in wide.items()}


def run(bench: Bench, shape: Shape, dtype: torch.dtype) -> Mapping[str, Times]:
    layers = Layers.make(shape, dtype, bench.device, 36, bench.options.budget << 20)
    wide, is_wide = layers.in_one_dtype(), shape.cache == "model"
    forms = baselines.usable(bench.options.baselines, bench.device, dtype, bench.say)
    forms = bench.usable(forms, dtype)
    stages: dict[str, Variants] = {stage: {} for stage in BASELINES}
    eager: dict[str, Callable[[int], object]] = {}
    ours: Ours | None = None
    peers: Ours | None = None  # what the baselines are compared with
    for backend in bench.backends(*layers.at(0), layers.visual):
        with bench.part(f"{backend} at {shape.name}"):
            candidate = Ours(layers, backend)
            calls = {f"{stage}/{backend}": candidate.timed(stage) for stage in stages}
            calls[f"anchor/{backend}:dense-output"] = candidate.timed("anchor_dense")
            peer = candidate if is_wide else Ours(wide, backend)
            if not is_wide:
                calls |= {f"{stage}/{backend}{WIDE}": peer.timed(stage) for stage in stages}
            made = {key: bench.captured_layers(call, len(layers)) for key, call in calls.items()}
            ours, peers, eager = candidate, peer, eager | calls
            for key, layer in made.items():
                stage, name = key.split("/")
                stages[stage][name] = layer
    if ours is None or peers is None:
        return {}
    for stage, variants in theirs(bench, wide, forms, peers).items() if forms else ():
        stages[stage] |= variants
    pages: dict[str, Paged] = {}
    reads: Variants = {}
    has_goals = bench.options.goals is not None and "cpu" in stages["dense"]
    if has_goals:
        reads = {f"dense/{READ}:{ahead}": stream_read(layers, ahead) for ahead in PAGES_AHEAD}
    if has_goals and shape.keys % max(PAGES) == 0:
        for n in PAGES:
            paged = Paged(layers, n, stages["dense"]["cpu"])
            stages["dense"][f"cpu:pages-{n}"] = pages[f"dense/cpu:pages-{n}"] = paged
    flat = {f"{stage}/{name}": v for stage, made in stages.items() for name, v in made.items()}
    positions = attended_positions(layers.kv[0], layers.visual, ours.selection)[0]
    several = has_goals and bench.options.threads > 1
    times, ceilings = bench.time(
        flat | reads, dtype, shape.head_dim * layers.kv[0].k.itemsize, layers, positions,
        reads={name: paged.memory for name, paged in pages.items()},
        on_one_thread=SCALE if several else (),
    )  # fmt: skip
    for which in ("", ONE_THREAD) if several else ("",):
        fastest = partial(_fastest, times, which)
        times[FOLLOWER_GATHER + which] = fastest("ceiling:gather", lambda t: t.p20)
        if reads:
            times[f"dense/{READ}{which}"] = fastest(f"dense/{READ}:", lambda t: t.best)
    times = {name: of for name, of in times.items() if not name.startswith(tuple(reads))}
    for key in times:  # the ceilings and what ran on one thread, timed among the others
        stage, _, name = key.partition("/")
        if stage in stages and name not in stages[stage]:
            stages[stage][name] = lambda turn: None
    work = works(shape, dtype)
    for stage, made in stages.items():
        of = {name: work[_work(stage, name, is_wide)] for name in made}
        facts = {
            name: {
                "visual": shape.visual,
                "retention": shape.retention,
                "flops": w.flops,
                "predicted_us": round(1e6 * cost.predict(w, ceilings.roof), 1),
            }
            | ({} if is_wide or not _reads_8_bits(name) else {"cache": shape.cache})
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
            work=of,
        )  # fmt: skip
    return times


def _fastest(
    times: Mapping[str, Times], which: str, prefix: str, by: Callable[[Times], float]
) -> Times:
    """The best of the forms of a probe, on one thread of several where `which` says so."""
    names = [name for name in times if name.startswith(prefix)]
    return min((times[n] for n in names if n.endswith(ONE_THREAD) == bool(which)), key=by)


def _reads_8_bits(name: str) -> bool:
    """Of the variants at a shape with a cache of 8 bits."""
    name = name.removesuffix(ONE_THREAD)
    return not name.endswith(WIDE) and (name in (READ, GATHER) or name.split(":")[0] in names())


def _work(stage: str, name: str, is_wide: bool) -> str:
    """What a variant does, by its name in `works`."""
    name = name.removesuffix(ONE_THREAD)
    kind = "anchor-dense-output" if name.endswith(":dense-output") else stage
    kind = READ if name == READ else kind
    return kind if is_wide or _reads_8_bits(name) else kind + WIDE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--goals", nargs="?", type=float, const=0.0, metavar="SHARE",
        help="hold the CPU engine to its ratios, but for this share of each; exit 1 where one is "
        f"short; shapes are {', '.join(GOAL_SHAPES)} unless named",
    )  # fmt: skip
    bench = Bench(parser, shapes="", dtypes="bf16")
    margin, lines = bench.options.goals, []
    usual = "b1-8k" if margin is None else ",".join(GOAL_SHAPES)
    for name in (bench.options.shapes or usual).split(","):
        for dtype in bench.dtypes:
            with bench.part(name):
                times = run(bench, SHAPES[name], dtype)
                if margin is not None:
                    lines += judged(times, name, dtype, margin, bench.options.threads)
    for _, line in lines:
        print(line)
    bench.failed += [line for holds, line in lines if not holds]
    if margin is not None and not lines:
        reason = get("cpu").unavailable()
        none = "no goal is stated for these shapes, dtypes, variants and threads"
        print(reason := f"backend cpu cannot run here: {reason}" if reason else none)
        bench.failed.append(reason)
    bench.finish()


if __name__ == "__main__":
    main()
