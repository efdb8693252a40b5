"""Random requests against one server for minutes: sizes, aborts, preemptions, opt-outs.

    $(python tests/serving/environment.py) tests/serving/soak.py --minutes 20

Fails on a wrong answer, a request that does not end, or memory that grows after the warm-up. Runs
in vLLM's Python, which has openai and psutil. A question counts as known once the server has
answered it rightly, alone, before the soak.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "serving"))
import ask
import psutil
import tiny_model
from openai import OpenAI
from server import Server

from visionpulse.data import trail

CLIENTS = 8
# Blocks of 32 tokens: fewer than eight of the largest pictures need at once.
FLAGS = (
    "--block-size", "32", "--num-gpu-blocks-override", "64", "--max-model-len", "1024",
    "--enable-prefix-caching",
)  # fmt: skip
KINDS = {"asked": 60, "aborted": 20, "off": 10, "10pct": 10}  # in per cent
GROWTH = 1.03  # of the median of the last fifth over that of the second
STUCK = 240  # seconds


class Soak:
    """Clients, what they saw, and the memory of the server's processes."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client = OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=STUCK, max_retries=0
        )
        self.model = self.client.models.list().data[0].id
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self.memory: list[int] = []  # bytes, of all processes together
        drawn = [one for side in (12, 16, 20) for one in trail.test_set(3, 8, side, "crowded")]
        self.known = [one for one in drawn if self.is_right(one)]
        assert len(self.known) > len(drawn) // 2

    def is_right(self, one, extra=None) -> bool:
        return ask.ask(self.client, self.model, *one, extra).is_right

    def client_until(self, end: float, seed: int) -> None:
        """Random requests, one after the other."""
        rng = random.Random(seed)
        while time.monotonic() < end:
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            one = rng.choice(self.known)
            try:
                if kind == "aborted":
                    self.abort(one, rng.randint(1, 200))
                elif not self.is_right(one, None if kind == "asked" else xargs(kind)):
                    self.faults.append(f"{kind}: a wrong answer")
            except Exception as error:
                self.faults.append(f"{kind}: {type(error).__name__}: {error}")
            self.seen[kind] += 1

    def abort(self, one, words: int) -> None:
        stream = ask.stream_of(
            self.client, self.model, *one, {"ignore_eos": True}, tokens=words + 50
        )
        for _, _ in zip(range(words), stream, strict=False):
            pass
        stream.close()

    def watch_until(self, end: float) -> None:
        root = psutil.Process(self.server.process.pid)
        while time.monotonic() < end:
            tree = [root, *root.children(recursive=True)]
            self.memory.append(sum(process.memory_info().rss for process in tree))
            time.sleep(2)

    def run(self, minutes: float) -> dict:
        end = time.monotonic() + 60 * minutes
        threads = [
            threading.Thread(target=self.client_until, args=(end, seed)) for seed in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        self.watch_until(end)
        for thread in threads:
            thread.join(STUCK)
        if any(thread.is_alive() for thread in threads):
            self.faults.append("a request did not end")
        self.server.until("vllm:num_requests_running", lambda n: n == 0)
        fifth = max(1, len(self.memory) // 5)
        early, late = (
            statistics.median(part)
            for part in (self.memory[fifth : 2 * fifth], self.memory[-fifth:])
        )
        if late > GROWTH * early:
            self.faults.append(f"memory grew from {early / 2**20:.0f} to {late / 2**20:.0f} MiB")
        seen = self.server.metrics()
        names = ("vllm:num_preemptions_total", "visionpulse:decode_rows_total",
                 "visionpulse:dense_rows_total")  # fmt: skip
        return {
            "requests": dict(self.seen), "faults": self.faults[:10],
            "memory_mib": [round(early / 2**20), round(late / 2**20)],
            **{name: seen.get(name, 0.0) for name in names},
        }  # fmt: skip


def xargs(kind: str) -> dict:
    return {"vllm_xargs": {"visionpulse": kind}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--setting", default='{"preset": "5pct"}')
    options = parser.parse_args()
    build = Path(__file__).resolve().parents[2] / "build"
    model = tiny_model.main(build / "tiny-vllm")
    setting = json.loads(options.setting)
    with Server(model, setting, build / "soak.log", *FLAGS) as server:
        said = Soak(server).run(options.minutes)
    print(json.dumps(said, indent=2))
    sys.exit(bool(said["faults"]))


if __name__ == "__main__":
    main()
