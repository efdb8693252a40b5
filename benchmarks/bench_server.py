"""`vllm bench serve` on pictures: a stock server beside ours on the same CPU, asked in turn.

    $(python tests/serving/environment.py) benchmarks/bench_server.py --shapes b1-4k,b8-4k,b8-16k

vLLM's own benchmark client streams chat completions with random pictures; a shape says how many
requests run at once and how many visual tokens each has. Attention of Qwen3-VL-4B, four layers, the
rest thin, one thread a server. The first round, which is not timed, leaves the prompts in the
prefix caches, so that what is timed is decode; its prefill attends to nothing (skip_prefill.py).
A row's times are medians of the latency between two tokens, one a round.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from pathlib import Path

import engine_model
import torch
from engine_model import PICTURE, SIDE, STOCK, TEXT
from shapes import SHAPES, Shape

from visionpulse.bench import rows
from visionpulse.bench.timing import Times
from visionpulse.data import trail

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "serving"))
from server import Server  # noqa: E402

LAYERS, HIDDEN = 4, 256
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def longest(shape: Shape, tokens: int) -> int:
    """Tokens of a request; the template and the marks of its pictures are the last term."""
    return int(shape.visual + TEXT + tokens + 4 * (shape.visual // PICTURE) + 64)


def flags(shapes: list[Shape], tokens: int) -> list[str]:
    """Of both servers."""
    pictures = max(shape.visual for shape in shapes) // PICTURE
    return [
        "--dtype", "bfloat16", "--max-num-seqs", str(max(shape.rows for shape in shapes)),
        "--max-model-len", str(max(longest(shape, tokens) for shape in shapes)),
        "--max-num-batched-tokens", "8192", "--enable-prefix-caching", "--skip-mm-profiling",
        "--limit-mm-per-prompt", json.dumps({"image": pictures, "video": 0}),
        "--worker-extension-cls", "skip_prefill.Extension",
    ]  # fmt: skip


def asked(url: str, shape: Shape, tokens: int) -> dict:
    """One run of vLLM's benchmark client: its results."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    side, pictures = SIDE * trail.CELL, shape.visual // PICTURE
    options = parser.parse_args([
        "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", url,
        "--model", str(engine_model.FOLDER), "--dataset-name", "random-mm",
        "--num-prompts", str(shape.rows), "--max-concurrency", str(shape.rows),
        "--random-input-len", str(TEXT), "--random-output-len", str(tokens),
        "--random-mm-base-items-per-request", str(pictures),
        "--random-mm-limit-mm-per-prompt", json.dumps({"image": pictures, "video": 0}),
        "--random-mm-bucket-config", f"{{({side}, {side}, 1): 1.0}}",
        "--temperature", "0", "--seed", "0", "--disable-tqdm", "--ready-check-timeout-sec", "0",
    ])  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = serve.main(options)
    if found["completed"] != shape.rows or found["total_output_tokens"] < shape.rows * tokens:
        raise RuntimeError(f"{found['completed']} of {shape.rows} answered:\n{said.getvalue()}")
    return found


def run(servers: dict[str, Server], shape: Shape, rounds: int, tokens: int) -> dict[str, list]:
    """Results of each round by name."""
    found: dict[str, list] = {name: [] for name in servers}
    for turn in range(2 * rounds + 1):
        for name in servers if turn % 2 else reversed(servers):
            if len(found[name]) == rounds:
                continue
            made = asked(servers[name].url, shape, tokens)
            itl, rate = made["median_itl_ms"], made["output_throughput"]
            # Tokens that were held up somewhere come all at once, and say nothing of a latency.
            is_burst = itl < 250 * shape.rows / rate
            if turn and not is_burst:
                found[name].append(made)
            print(
                f"{shape.name} {name}: {itl:.1f} ms between tokens, {rate:.2f} tokens/s"
                f"{', a burst' if is_burst else ''}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return found


def rows_of(shape: Shape, found: dict[str, list], machine: rows.Machine, tokens: int) -> list:
    times = {
        name: Times(tuple(sorted(one["median_itl_ms"] / 1e3 for one in made)))
        for name, made in found.items()
    }
    settings = engine_model.settings(LAYERS)
    facts = {
        name: {
            "tokens_s": round(max(one["output_throughput"] for one in made), 3),
            "p99_itl_ms": round(min(one["p99_itl_ms"] for one in made), 2),
            "requests": shape.rows, "visual": shape.visual, "output_tokens": tokens,
            "layers": LAYERS, "hidden": HIDDEN, "setting": settings[name],
        }
        for name, made in found.items()
    }  # fmt: skip
    return rows.rows_of(
        "server", shape.name, torch.bfloat16, times, machine, baseline=STOCK, facts=facts,
        checked=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="b1-4k,b8-4k,b1-16k,b8-16k")
    parser.add_argument("--settings", default="vllm:paper", help="of ours, by comma")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--out", type=Path, help="file of rows to write or to add to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine_model.write(LAYERS, HIDDEN)
    shapes = [SHAPES[name] for name in options.shapes.split(",")]
    gib = max(
        engine_model.cache_gib(one.rows, longest(one, options.tokens), LAYERS) for one in shapes
    )
    here = os.environ.get("PYTHONPATH", "")
    os.environ |= ENVIRONMENT | {
        "VLLM_CPU_KVCACHE_SPACE": str(gib),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "benchmarks"), here))),
    }
    machine = rows.Machine.here()
    settings = engine_model.settings(LAYERS)
    names = [STOCK, *options.settings.split(",")]
    with contextlib.ExitStack() as stack:
        logs = engine_model.FOLDER.parent
        servers = {
            name: stack.enter_context(
                Server(
                    engine_model.FOLDER, settings[name],
                    logs / f"server-{name.partition(':')[2]}.log", *flags(shapes, options.tokens),
                )
            )
            for name in names
        }  # fmt: skip
        for shape in shapes:
            made = rows_of(
                shape, run(servers, shape, options.rounds, options.tokens), machine, options.tokens
            )
            print(rows.table(made), flush=True)
            if options.out:
                rows.write(options.out, made)


if __name__ == "__main__":
    main()
