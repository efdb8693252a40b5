"""All layers of one decode step under each schedule, weights excluded.

    python benchmarks/bench_decode.py --shapes b1-8k,b1-32k --dtypes bf16,fp32 --out rows.jsonl

On a GPU a step of ours is one CUDA graph. On a CPU one layer of each kind is timed, cold, and
multiplied, for ours as for the baselines: a neighbour interrupts any run of 100 ms, and a best of
whole steps would show that neighbour. `--whole` times the steps as well and puts them beside.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from types import ModuleType

import baselines
import torch
from baselines import PLAIN, Form, attended_positions
from harness import Bench, launches_of
from methods import block64
from shapes import SHAPES, Layers, Shape

import visionpulse as vp
from visionpulse.backends import get
from visionpulse.bench import cost, torch_forms
from visionpulse.bench.check import check_output, check_selection
from visionpulse.bench.timing import OncePerStep, Times
from visionpulse.layer_ops import LayerOps
from visionpulse.schedule import Role, roles

SCHEDULES: dict[str, dict[str, object] | None] = {
    "dense": None,
    "paper": {},
    "paper-dense-anchor": {"anchor_output": "dense"},
    "paper-anchors-8-17": {"anchor": (8, 17)},
    "lookback": {"schedule": "lookback"},
    "per_layer": {"schedule": "per_layer"},
}
PUBLISHED = "published-block64"
IN_TORCH = "torch-visionpulse"  # the same method in plain torch


class Step:
    """One step of ours: the ops of all layers in order, called as a patched model does."""

    def __init__(self, layers: Layers, count: int, changes: dict[str, object] | None, backend: str):
        self.layers, self.backend = layers, backend
        self.config = None if changes is None else layers.shape.config(**_fit(changes, count))
        full = (True,) * count
        dense = (Role.DENSE,) * count
        self.roles = dense if self.config is None else roles(self.config, full, 1)
        self.workspace = vp.Workspace()
        unchanged = layers.shape.config() if self.config is None else self.config
        self.ops = LayerOps(*layers.at(0), layers.visual, replace(unchanged, backend=backend))
        self.outs = [torch.empty_like(q) for q in layers.q]
        self.kept: vp.Selection | None = None
        if Role.FOLLOWER in self.roles[:1]:  # "lookback" starts from the step before
            self.kept = self.decode(0)

    def decode(self, layer: int) -> vp.Selection:
        (q, kv), out = self.layers.at(layer), self.outs[layer % len(self.layers)]
        return self.ops.decode(q, kv, self.layers.visual, self.workspace, out)[1]

    def attend(self, layer: int, selection: vp.Selection | None) -> torch.Tensor:
        (q, kv), out = self.layers.at(layer), self.outs[layer % len(self.layers)]
        visual = None if selection is None else self.layers.visual
        return self.ops.attend(q, kv, visual, selection, self.workspace, out)

    def __call__(self, turn: int = 0) -> None:
        selection = self.kept
        for layer, role in enumerate(self.roles):
            if role is Role.ANCHOR:
                selection = self.decode(layer)
            else:
                self.attend(layer, selection if role is Role.FOLLOWER else None)

    def layer_name(self, role: Role) -> str:
        """What one layer of this role is called among the variants."""
        dense = role is Role.ANCHOR and self.config.anchor_output == "dense"
        return f"{self.backend}:layer:{role.value}{'-dense-output' if dense else ''}"

    def single(self, role: Role) -> Callable[[int], object]:
        """One layer of this role, whichever inputs its turn brings."""
        if role is Role.ANCHOR:
            return OncePerStep(self.decode, self.workspace)
        selection = self.decode(0) if role is Role.FOLLOWER else None
        return lambda turn: self.attend(turn, selection)

    def work(self, problem: cost.OpShape) -> cost.Work:
        """What the step must move and compute."""
        output = self.config.anchor_output if self.config else "pruned"
        return cost.attention(Counter(self.roles), problem, self.layers.shape.kept, output)

    def check(self) -> None:
        """Check a dense layer, an anchor and a follower, one KV head of each row, in float64."""
        check_output(self.layers, 0, self.attend(0, None), None, self.backend)
        if self.config is None or Role.ANCHOR not in self.roles:
            return
        selection = self.decode(0)
        check_selection(self.layers, selection, self.config, self.backend)
        pruned = self.config.anchor_output == "pruned"
        check_output(self.layers, 0, self.outs[0], selection if pruned else None, self.backend)
        check_output(self.layers, 1, self.attend(1, selection), selection, self.backend)


def _fit(changes: dict[str, object], count: int) -> dict[str, object]:
    """Anchors of 36 layers at their places among `count`."""
    anchor = changes.get("anchor")
    if not isinstance(anchor, tuple):
        return changes
    return changes | {"anchor": tuple(place * count // 36 for place in anchor)}


def torch_anchor(layers: Layers) -> Callable[[int], object]:
    """The anchor in plain torch, checked on the first layer."""
    shape, config = layers.shape, layers.shape.config()
    is_visual = layers.visual.mask(shape.keys)
    visual, text = ((m.nonzero()[:, 1].view(shape.rows, -1)) for m in (is_visual, ~is_visual))
    q, kv = layers.at(0)
    out, positions, _ = torch_forms.anchor(q, kv, visual, text, shape.kept, config)
    # checked against attention over exactly the keys that it selected
    torch.testing.assert_close(out, torch_forms.gathered(q, kv, positions))
    assert int(is_visual.gather(1, positions).sum(1)[0]) == shape.kept
    return lambda turn: torch_forms.anchor(*layers.at(turn), visual, text, shape.kept, config)


def published(device: torch.device) -> ModuleType:
    """The published scheme: its kernels on a GPU, whole matrices elsewhere."""
    if device.type != "cuda":
        return block64
    from methods import block64_triton

    block64_triton.check()
    return block64_triton


def published_layers(bench: Bench, layers: Layers) -> dict[str, Callable[[int], object]]:
    """A layer of each role of the published scheme."""
    config, scheme = layers.shape.config(), published(bench.device)
    _, blocks = scheme.anchor(*layers.at(0), layers.visual, config)
    return {
        "dense": lambda turn: scheme.dense(*layers.at(turn)),
        "anchor": lambda turn: scheme.anchor(*layers.at(turn), layers.visual, config),
        "follower": lambda turn: scheme.follower(*layers.at(turn), blocks),
    }


def single_layers(
    bench: Bench, layers: Layers, forms: list[Form], selection: vp.Selection
) -> tuple[dict[str, Callable[[int], object]], set[str]]:
    """One layer of each kind of each baseline, to be multiplied; and the names that cannot run."""
    kept, many = attended_positions(layers.kv[0], layers.visual, selection), len(layers)
    wanted: dict[str, Callable[[], Callable[[int], object]]] = {}

    def dense(form: Form) -> Callable[[int], object]:
        return bench.captured_layers(lambda turn: form.dense(*layers.at(turn)), many, form.name)

    def sparse(form: Form) -> Callable[[int], object]:
        layer = lambda turn: form.sparse(*layers.at(turn), kept)  # noqa: E731
        return bench.captured_layers(layer, many, form.name)

    for form in forms:
        if form.dense is not None:
            wanted[f"{form.name}:dense"] = lambda form=form: dense(form)
        if form.sparse is not None:
            wanted[f"{form.name}:follower"] = lambda form=form: sparse(form)
    wanted[f"{IN_TORCH}:anchor"] = lambda: torch_anchor(layers)
    # never a graph: the published scheme reads the device, and that is part of its cost
    scheme = cache(lambda: published_layers(bench, layers))
    for role in ("dense", "anchor", "follower"):
        wanted[f"{PUBLISHED}:{role}"] = lambda role=role: scheme()[role]
    return bench.baselines(wanted)


def composed(times: Mapping[str, Times], parts: Mapping[str, int]) -> Times:
    """A step made of single layers: the sum of their times, round by round of equal rank.

    On a GPU such a step is one graph, whose launch comes once.
    """
    rounds = zip(*(times[name].seconds for name in parts), strict=True)
    counts = tuple(parts.values())
    launch = max(times[name].launch for name in parts)
    return Times(tuple(launch + sum(c * t for c, t in zip(counts, r, strict=True)) for r in rounds))


def recipes(ours: Mapping[str, Step], forms: list[Form], count: int) -> dict[str, dict[str, int]]:
    """Which single layers make a step."""
    made = {}
    for name, step in ours.items():
        counts = Counter(step.roles)
        made[name] = {step.layer_name(role): n for role, n in counts.items()}
    made |= {form.name: {f"{form.name}:dense": count} for form in forms if form.dense}
    if forms:
        counts = Counter(roles(vp.PulseConfig(), (True,) * count, 1))
        made[PUBLISHED] = {f"{PUBLISHED}:{role.value}": n for role, n in counts.items()}
        if PLAIN in {form.name for form in forms}:
            of = {Role.ANCHOR: f"{IN_TORCH}:anchor"}
            made[IN_TORCH] = {of.get(r, f"{PLAIN}:{r.value}"): n for r, n in counts.items()}
    return made


def our_layers(bench: Bench, ours: Mapping[str, Step]) -> dict[str, Callable[[int], object]]:
    """One layer of ours of each kind that some step has."""
    variants: dict[str, Callable[[int], object]] = {}
    for step in ours.values():
        for role in sorted(set(step.roles), key=lambda role: role.value):
            if step.layer_name(role) not in variants:
                layer = bench.captured_layers(step.single(role), len(step.layers))
                variants[step.layer_name(role)] = layer
    return variants


def run(bench: Bench, shape: Shape, dtype: torch.dtype, options: argparse.Namespace) -> None:
    device, count = bench.device, options.layers
    layers = Layers.make(shape, dtype, device, count, options.budget << 20)
    forms = baselines.usable(options.baselines, device, dtype, bench.say)
    forms = bench.usable(forms, dtype)
    chosen = layers.shape.config()
    ours: dict[str, Step] = {}
    singles: dict[str, Callable[[int], object]] = {}
    steps: dict[str, Callable[[int], object]] = {}
    selection: vp.Selection | None = None
    for backend in bench.backends(*layers.at(0), layers.visual):
        with bench.part(f"{backend} at {shape.name}"):
            mine = {
                f"{backend}:{name}": Step(layers, count, SCHEDULES[name], backend)
                for name in options.schedules.split(",")
            }
            for step in mine.values():
                step.check()
            _, kept = vp.decode(*layers.at(0), layers.visual, chosen, backend=backend)
            alone = our_layers(bench, mine)
            is_whole = options.whole or device.type == "cuda"
            whole_steps = {
                f"whole:{name}": bench.captured(step) for name, step in mine.items() if is_whole
            }
            ours, singles, steps = ours | mine, singles | alone, steps | whole_steps
            selection = kept
    if selection is None:
        return
    missing: set[str] = set()
    if forms:
        theirs, missing = single_layers(bench, layers, forms, selection)
        singles |= theirs
    positions = attended_positions(layers.kv[0], layers.visual, selection)[0]
    every = [tensor for kv in layers.kv for tensor in (kv.k, kv.v)]
    times, ceilings = bench.time(
        {**steps, **singles}, dtype, shape.head_dim * dtype.itemsize, layers, positions,
        reads=dict.fromkeys(steps, lambda turn: every),
    )  # fmt: skip
    made = {
        name: parts
        for name, parts in recipes(ours, forms, count).items()
        if not missing.intersection(parts)
    }
    whole = {name: composed(times, parts) for name, parts in made.items()}
    problem = shape.cost(dtype)
    work = {name: cost.dense(problem).times(count) for name in made}
    paper = cost.attention(Counter(roles(chosen, (True,) * count, 1)), problem, shape.kept)
    work |= {name: paper for name in (PUBLISHED, IN_TORCH) if name in made}
    facts = {}
    for name in whole:
        if name in ours:
            work[name] = ours[name].work(problem)
        facts[name] = {
            "layers": count,
            "distinct_layers": len(layers),
            "visual": shape.visual,
            "retention": shape.retention,
            "predicted_us": round(cost.predict(work[name], ceilings.roof) * 1e6, 1),
        }
        composition = " + ".join(f"{n} x {part}" for part, n in made[name].items())
        if f"whole:{name}" in times:
            facts[name]["whole_step_us"] = round(1e6 * times[f"whole:{name}"].best, 1)
        if device.type == "cuda" and name in ours:
            whole[name] = times[f"whole:{name}"]
        else:
            facts[name]["composed"] = composition
    bench.add(
        "decode", shape.name, dtype, whole, ceilings, baseline=PLAIN, facts=facts,
        work={name: work[name] for name in whole},
        launches={name: launches_of(step, device) for name, step in ours.items()},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--whole", action="store_true", help="time whole steps on a CPU as well")
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    bench = Bench(parser, shapes="b1-8k", dtypes="bf16")
    options = bench.options
    unknown = set(options.schedules.split(",")) - set(SCHEDULES)
    if unknown:
        raise SystemExit(f"no schedule {', '.join(unknown)}; known: {', '.join(SCHEDULES)}")
    for shape in options.shapes.split(","):
        for dtype in bench.dtypes:
            with bench.part(shape):
                run(bench, SHAPES[shape], dtype, options)
    bench.finish()


if __name__ == "__main__":
    get("reference")  # the registry is loaded before a backend is named
    main()
