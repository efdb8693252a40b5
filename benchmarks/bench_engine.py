"""A whole decode step inside vLLM, stock beside ours, interleaved on the same CPU.

    $(python tests/serving/environment.py) benchmarks/bench_engine.py --shapes b1-4k,b8-1k

Runs in the Python that has vLLM; an engine is a process of one thread, and its clock the CPU time
of that process: scheduler, model, sampling and our statistics included. Random weights, attention
of Qwen3-VL-4B, the rest thin, so that attention and what surrounds it are what is seen. Prefill
attends to nothing (skip_prefill.py).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import engine_model
from engine_model import PICTURE, SIDE, STOCK, TEXT

HERE = Path(__file__).resolve()
LAYERS, HIDDEN = 8, 512
SETTINGS = engine_model.settings(LAYERS)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1",
}  # fmt: skip


def longest(visual: int) -> int:
    """Tokens of a request."""
    return visual + TEXT + 1024


def engine(rows: int, visual: int, setting: dict | None) -> None:
    """Decode `rows` requests; for each line on stdin, as many steps as it says."""
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    from visionpulse.data import trail

    pictures = visual // PICTURE
    llm = LLM(
        str(engine_model.FOLDER), dtype="bfloat16", max_model_len=longest(visual),
        max_num_seqs=rows, enforce_eager=True,
        limit_mm_per_prompt={"image": pictures, "video": 0}, skip_mm_profiling=True,
        max_num_batched_tokens=8192, enable_prefix_caching=False, seed=0,
        additional_config={} if setting is None else {"visionpulse": setting},
    ).llm_engine  # fmt: skip
    import skip_prefill  # noqa: F401

    own = [trail.VISION_START, trail.IMAGE, trail.VISION_END]
    ids = [trail.BOS, *(own * pictures), *([trail.HAS] * (TEXT - 1 - 2 * pictures))]
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    for row in range(rows):
        random, size = np.random.default_rng(row), (SIDE * trail.CELL, SIDE * trail.CELL, 3)
        drawn = [Image.fromarray(random.integers(0, 255, size, np.uint8)) for _ in range(pictures)]
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": drawn}}
        llm.add_request(str(row), prompt, params)
    made: dict[str, list[int]] = {}
    while len(made) < rows or min(map(len, made.values())) < 2:
        made |= {out.request_id: out.outputs[0].token_ids for out in llm.step()}
    print(json.dumps({"tokens": 2}), flush=True)
    for line in sys.stdin:
        begun = time.process_time()
        for _ in range(int(line)):
            made |= {out.request_id: out.outputs[0].token_ids for out in llm.step()}
        seconds = (time.process_time() - begun) / int(line)
        tokens = [list(made[str(row)]) for row in range(rows)]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, rows: int, visual: int, setting: dict | None) -> None:
        spec = json.dumps([rows, visual, setting])
        gib = engine_model.cache_gib(rows, longest(visual), LAYERS)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE), "--engine", spec], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(gib)},
        )  # fmt: skip

    def said(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the engine ended with {self.process.wait()}")

    def steps(self, count: int) -> dict:
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self.said()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def run(shape: str, names: list[str], rounds: int, steps: int) -> tuple[dict, dict]:
    """Seconds a step of each round, and the last tokens, by name."""
    from shapes import SHAPES

    rows, visual = SHAPES[shape].rows, SHAPES[shape].visual
    engines: dict[str, Engine] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens = {}
    try:
        for name in names:
            engines[name] = Engine(rows, visual, SETTINGS[name])
        for one in engines.values():
            one.said()
        for turn in range(rounds + 1):
            for name in names if turn % 2 else reversed(names):
                said = engines[name].steps(steps)
                tokens[name] = said["tokens"]
                if turn:  # the first round warms up
                    seconds[name].append(said["seconds"])
    finally:
        for one in engines.values():
            one.close()
    return seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="b1-4k,b8-1k")
    parser.add_argument("--settings", default="vllm:keep-all,vllm:paper")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="of each engine in a round")
    parser.add_argument("--out", type=Path, help="file of rows to write or to add to")
    parser.add_argument("--engine", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine(*json.loads(options.engine))
        return
    import torch

    from visionpulse.bench import rows
    from visionpulse.bench.timing import Times

    torch.set_num_threads(1)
    engine_model.write(LAYERS, HIDDEN)
    names = [STOCK, *options.settings.split(",")]
    for shape in options.shapes.split(","):
        machine = rows.Machine.here()
        seconds, tokens = run(shape, names, options.rounds, options.steps)
        times = {name: Times(tuple(sorted(own))) for name, own in seconds.items()}
        facts = {
            name: {
                "layers": LAYERS, "hidden": HIDDEN, "steps": options.steps,
                "setting": SETTINGS[name],
                "tokens_as_stock": sum(
                    a == b for a, b in zip(tokens[name], tokens[STOCK], strict=True)
                ),
            }
            for name in names
        }  # fmt: skip
        made = rows.rows_of(
            "engine", shape, torch.bfloat16, times, machine, baseline=STOCK, facts=facts
        )
        print(rows.table(made))
        print({name: own["tokens_as_stock"] for name, own in facts.items()})
        if options.out:
            rows.write(options.out, made)


if __name__ == "__main__":
    main()
