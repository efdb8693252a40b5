"""Where a follower pays: its time against retention and context, and against the batch.

    python benchmarks/bench_sweep.py --sweep retention --out rows.jsonl --plots plots
    python benchmarks/bench_sweep.py --sweep batch --out rows.jsonl

Each shape is one interleaved run of our dense layer, our anchor, torch's forms, and a follower at
every retention. Contexts whose keys and values pass --most bytes are left to a larger machine.
"""

import argparse
from pathlib import Path

import baselines
import torch
from baselines import PLAIN
from harness import Bench
from shapes import BATCHES, CONTEXTS, SHAPES, Layers, Shape
from torch import Tensor

import visionpulse as vp
from visionpulse.bench import cost, plots, torch_forms
from visionpulse.bench.check import check_output
from visionpulse.bench.rows import Row, dtype_name, read
from visionpulse.bench.timing import OncePerStep

RETENTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def run(bench: Bench, shape: Shape, dtype: torch.dtype, retentions: tuple[float, ...]) -> list[Row]:
    """One shape: rows of the dense layer, the anchor and a follower at each retention."""
    layers = Layers.make(shape, dtype, bench.device, 36, bench.options.budget << 20)
    visual, problem = layers.visual, shape.cost(dtype)
    baselines.check(PLAIN, bench.device.type, dtype)
    variants = {PLAIN: lambda turn: torch_forms.grouped(*layers.at(turn))}
    work, shares = {PLAIN: cost.dense(problem)}, {}
    for backend in bench.backends(*layers.at(0), visual):
        common = {"workspace": vp.Workspace(), "backend": backend}
        variants[f"{backend}:dense"] = dense(layers, common)
        work[f"{backend}:dense"] = cost.dense(problem)
        variants[f"{backend}:anchor"] = anchor(layers, shape.config(), common)
        work[f"{backend}:anchor"] = cost.decode(problem, shape.kept)
        for share in retentions:
            _, kept = vp.decode(
                *layers.at(0), visual, vp.PulseConfig(ratio=(share, share)), **common
            )
            name = f"{backend}:follower-{100 * share:g}%"
            variants[name] = follower(layers, kept, common)
            work[name] = cost.attend(problem, int(kept.counts[0]))
            shares[name] = share
            out = vp.attend(*layers.at(1), visual, kept, backend=backend)
            check_output(layers, 1, out, kept, backend)
    variants = {
        name: bench.captured_layers(layer, len(layers), name) for name, layer in variants.items()
    }
    times, ceilings = bench.time(variants, dtype, shape.head_dim * dtype.itemsize, layers)
    facts = {
        name: {
            "visual": shape.visual,
            "rows": shape.rows,
            "retention": shares.get(name),
            "flops": work[name].flops,
            "predicted_us": round(1e6 * cost.predict(work[name], ceilings.roof), 1),
        }
        for name in times
        if name in work
    }
    return bench.add(
        "sweep", shape.name, dtype, {name: times[name] for name in work}, ceilings, facts=facts,
        work=work,
    )  # fmt: skip


def dense(layers: Layers, common: dict):
    return lambda turn: vp.attend(*layers.at(turn), **common)


def anchor(layers: Layers, config: vp.PulseConfig, common: dict):
    def decode(turn: int) -> tuple[Tensor, vp.Selection]:
        return vp.decode(*layers.at(turn), layers.visual, config, **common)

    return OncePerStep(decode, common["workspace"])


def follower(layers: Layers, kept: vp.Selection, common: dict):
    return lambda turn: vp.attend(*layers.at(turn), layers.visual, kept, **common)


def crossover(rows: list[Row]) -> dict[str, float | None]:
    """The largest retention at which a follower still beats our dense layer, by backend."""
    found: dict[str, float | None] = {}
    times = {row.backend: row.us_best for row in rows}
    for row in rows:
        share = row.facts.get("retention")
        if share is None:
            continue
        backend = row.backend.split(":")[0]
        found.setdefault(backend, None)
        if row.us_best < times[f"{backend}:dense"]:
            found[backend] = max(found[backend] or 0.0, share)
    return found


def draw_backend(rows: list[Row], folder: Path, backend: str, where: str) -> list[Path]:
    """Time over dense by retention, and a layer's time by context, from rows alone."""
    single = [row for row in rows if row.facts["rows"] == 1]
    by_shape: dict[str, dict[float, float]] = {}
    lines: dict[str, dict[int, float]] = {}
    ours = {(row.shape, row.backend): row.us_best for row in single}
    for row in single:
        share, visual = row.facts["retention"], row.facts["visual"]
        if row.backend.startswith(f"{backend}:follower"):
            over = row.us_best / ours[row.shape, f"{backend}:dense"]
            by_shape.setdefault(plots.short(visual), {})[share] = over
        if share in (None, 0.01, 0.05, 0.1):
            title = row.backend.replace(f"{backend}:", "ours, ")
            lines.setdefault(title, {})[visual] = row.us_best / 1e6
    written = []
    if by_shape:
        written.append(folder / "retention.png")
        plots.by_retention(
            by_shape, written[-1], title="A follower, by tokens kept and context", note=where
        )
    if lines:
        written.append(folder / "context.png")
        plots.by_context(
            lines, written[-1], title="One layer of decoding, by context", note=where,
            unit="milliseconds per layer",
        )  # fmt: skip
    return written


def chosen(sweep: str, most: int, dtype: torch.dtype) -> list[str]:
    """Shapes of a sweep whose keys and values stay under `most` bytes."""
    names = (
        [f"b1-{context}" for context in CONTEXTS]
        if sweep == "retention"
        else [f"b{rows}-4k" for rows in BATCHES]
    )
    return [name for name in names if SHAPES[name].cache_bytes(dtype) <= most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", choices=["retention", "batch"], default="retention")
    parser.add_argument("--most", type=int, default=600 << 20, help="bytes of one layer's cache")
    parser.add_argument("--plots", default="", help="folder to draw into")
    parser.add_argument("--from-rows", default="", help="draw the rows of a file, measure nothing")
    bench = Bench(parser, shapes="", dtypes="bf16")
    options = bench.options
    retentions = RETENTIONS if options.sweep == "retention" else (0.05,)
    if options.from_rows:
        bench.rows = [row for row in read(options.from_rows) if row.bench == "sweep"]
    else:
        for dtype in bench.dtypes:
            given = options.shapes.split(",") if options.shapes else ()
            for name in given or chosen(options.sweep, options.most, dtype):
                with bench.part(name):
                    made = run(bench, SHAPES[name], dtype, retentions)
                    for backend, share in crossover(made).items():
                        upto = "never" if share is None else f"up to {100 * share:g} % kept"
                        bench.say(f"{name} {backend}: a follower beats our dense layer {upto}\n")
    draw(bench)
    bench.finish()


def draw(bench: Bench) -> None:
    """The plots, where they were asked for."""
    options = bench.options
    for dtype in bench.dtypes if options.plots else ():
        rows = [row for row in bench.rows if row.dtype == dtype_name(dtype)]
        for backend in sorted({row.backend.split(":")[0] for row in rows if ":" in row.backend}):
            where = f"{rows[0].machine['device']}, {dtype_name(dtype)}, batch 1, {backend}"
            for path in draw_backend(rows, Path(options.plots), backend, where):
                bench.say(f"drawn: {path}")


if __name__ == "__main__":
    main()
