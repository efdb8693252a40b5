"""Random requests against one server for minutes: sizes, budgets, opt-outs, aborts, preemptions.

    $(python tests/serving/environment.py) tests/serving/soak.py --minutes 20 --out FILE

Each answer is compared with what the same server said to the same request alone, before the soak.
An answer that differs must be one of a request that was preempted: vLLM then reads the prompt and
the words so far anew, in one dense prefill, so the server, asked alone for what follows them, says
the rest. Fails on any other answer, a request that does not end, or memory that grows after the
warm-up. Runs in vLLM's Python, which has openai and psutil; `--out` appends what was seen as a row.
`--setting null` asks stock vLLM the same.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "serving"))
import ask
import psutil
import tiny_model
from openai import OpenAI
from server import GIVES_BACK, Server

from visionpulse.bench.rows import Machine
from visionpulse.data import tiny, trail
from visionpulse.files import append_line

BUILD = Path(__file__).resolve().parents[2] / "build"
CLIENTS = 8
# Blocks of 32 tokens: fewer than eight of the largest pictures need at once. vLLM's cache of
# pictures would grow to 4 GiB before it lets any go.
FLAGS = (
    "--block-size", "32", "--num-gpu-blocks-override", "64", "--max-model-len", "1024",
    "--enable-prefix-caching", "--mm-processor-cache-gb", "0.03",
)  # fmt: skip
NEW = 0.5  # of the requests bring pictures that no cache has seen
KINDS = {"whole": 6, "cut short": 2, "aborted": 2}  # how often, of ten
WISHES = {None: 5, "off": 1, "10pct": 1, "fixed:0.05": 1, "top_k:40": 1}
GROWTH = 1.03  # of the median memory of the last fifth over that of the second
STUCK = 240  # seconds


class Case(NamedTuple):
    """One message, and the budget that it asks for."""

    name: str
    content: list[dict[str, Any]]
    wish: str | None
    answer: tuple[str, ...]  # empty where no right answer is known


def cases() -> Iterator[Case]:
    """Pictures of three sizes, two at once and none, each with every wish."""
    asked = []
    for side in (12, 16, 20):
        for i, (picture, question) in enumerate(trail.test_set(3, 5, side, "crowded")):
            content = [_picture(picture), _text(question)]
            answer = tuple(trail.words(tiny.until_end(question.answer)))
            asked.append((f"{side} by {side}, {i}", content, answer))
    for i in range(3):
        (first, one), (second, two) = trail.test_set(9 + i, 2, 14, "sparse")
        content = [_picture(first), _text(one), _picture(second), _text(two)]
        asked.append((f"two pictures, {i}", content, ()))
    asked.append(("no picture", [_text(trail.test_set(3, 1, 12, "sparse")[0][1])], ()))
    for name, content, answer in asked:
        for wish in WISHES:
            yield Case(name, content, wish, answer)


def _picture(picture: trail.Picture) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": ask.url_of(picture)}}


def _text(question: trail.Question) -> dict[str, Any]:
    return {"type": "text", "text": " ".join(trail.words(question.prompt))}


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
        self.others: list[tuple[Case, str, list[str], list[str]]] = []  # answers that differ
        self.wrong = 0
        self.slowest = 0.0  # seconds of a request
        self.memory: list[dict[int, int]] = []  # bytes of each process
        self.cases = [*cases()]
        self.alone = [self.words(case) for case in self.cases]
        again = [self.words(case) for case in self.cases]  # now with cached prefixes
        for case, first, second in zip(self.cases, self.alone, again, strict=True):
            self.compare(case, "alone again", second, first)
        known = [
            words == [*case.answer][: len(words)] and len(words) >= len(case.answer) - 1
            for case, words in zip(self.cases, self.alone, strict=True)
            if case.answer
        ]
        self.right = sum(known) / len(known)

    def stream(
        self, case: Case, tokens: int, extra: dict[str, Any], begun: Sequence[str] = ()
    ) -> Any:
        """The streamed answer, or what follows the words that it has begun with."""
        wish = {"vllm_xargs": {"visionpulse": case.wish}} if case.wish else {}
        content = case.content
        if random.random() < NEW:  # a name of its own makes a picture new
            content = [
                part | {"uuid": uuid.uuid4().hex} if part["type"] == "image_url" else part
                for part in content
            ]
        messages: Any = [{"role": "user", "content": content}]
        if begun:
            messages.append({"role": "assistant", "content": " ".join(begun)})
            extra = extra | {"add_generation_prompt": False, "continue_final_message": True}
        return self.client.chat.completions.create(
            model=self.model,
            messages=messages,
            stream=True,
            temperature=0,
            max_tokens=tokens,
            extra_body={"skip_special_tokens": False} | wish | extra,
        )

    def words(
        self, case: Case, tokens: int = trail.LONGEST_ANSWER, begun: Sequence[str] = ()
    ) -> list[str]:
        """All words of an answer of at most so many tokens."""
        chunks = self.stream(case, tokens, {}, begun)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).split()

    def abort(self, case: Case, words: int) -> list[str]:
        """The words that came before the client hung up; the answer has no end."""
        stream, said = self.stream(case, words + 50, {"ignore_eos": True}), ""
        for chunk in stream:
            said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            if len(said.split()) >= words:
                break
        stream.close()
        return said.split()[:-1]  # the last may be half a word

    def compare(self, case: Case, how: str, said: list[str], wanted: list[str]) -> None:
        """Keep an answer that differs."""
        if said != wanted:
            self.others.append((case, how, said, wanted))

    def judge(self) -> None:
        """Ask alone how those answers came about."""
        for case, how, said, wanted in self.others:
            pairs = enumerate(zip(said, wanted, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(said), len(wanted)))
            again = (
                self.words(case, len(said) - k, said[:k]) == said[k:] for k in range(1, same + 1)
            )
            if how != "alone again" and any(again):
                self.seen["differs behind a preemption"] += 1
                continue
            self.wrong += 1
            said, wanted = " ".join(said), " ".join(wanted)
            self.faults.append(f"{case.name}, {case.wish}, {how}: {said!r}, expected {wanted!r}")

    def request(self, rng: random.Random) -> None:
        """One random request, compared with what was said to it alone."""
        number = rng.randrange(len(WISHES), len(self.cases))
        wish = rng.choices(range(len(WISHES)), list(WISHES.values()))[0]
        number += wish - number % len(WISHES)
        case, alone = self.cases[number], self.alone[number]
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        self.seen[kind] += 1
        self.seen[f"wish {case.wish}"] += 1
        if kind == "whole":
            self.compare(case, kind, self.words(case), alone)
            return
        if kind == "cut short":
            tokens = rng.randint(1, 12)
            said = self.words(case, tokens)
            self.compare(case, kind, said, alone[: len(said)])
            if len(said) != min(tokens, len(alone)):
                self.faults.append(f"{case.name}, {kind}: {len(said)} words for {tokens} tokens")
            return
        said = self.abort(case, rng.randint(1, 200))
        common = min(len(said), len(alone))  # behind END nothing is known
        self.compare(case, kind, said[:common], alone[:common])

    def client_until(self, end: float, seed: int) -> None:
        """Random requests, one after the other."""
        rng = random.Random(seed)
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                self.request(rng)
            except Exception as error:
                self.faults.append(f"{type(error).__name__}: {error}")
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def watch_until(self, end: float) -> None:
        root = psutil.Process(self.server.process.pid)
        while time.monotonic() < end:
            tree = [root, *root.children(recursive=True)]
            self.memory.append({one.pid: one.memory_info().rss for one in tree})
            time.sleep(2)

    def run(self, minutes: float) -> dict[str, Any]:
        end = time.monotonic() + 60 * minutes
        threads = [
            threading.Thread(target=self.client_until, args=(end, seed), daemon=True)
            for seed in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        self.watch_until(end)
        for thread in threads:
            thread.join(STUCK)
        stuck = sum(thread.is_alive() for thread in threads)
        if stuck:
            self.faults.append(f"{stuck} requests did not end")
        self.server.until("vllm:num_requests_running", lambda n: n == 0)
        self.judge()
        fifth = max(1, len(self.memory) // 5)
        early, late = (
            {pid: statistics.median(one[pid] for one in part) / 2**20 for pid in part[-1]}
            for part in (self.memory[fifth : 2 * fifth], self.memory[-fifth:])
        )
        total = [sum(part.values()) for part in (early, late)]
        if total[1] > GROWTH * total[0]:
            self.faults.append(f"memory grew, MiB by process: {early} to {late}")
        seen = self.server.metrics()
        names = {"preemptions": "vllm:num_preemptions_total",
                 "cached_tokens": "vllm:prefix_cache_hits_total",
                 "sparse_rows": "visionpulse:decode_rows_total",
                 "dense_rows": "visionpulse:dense_rows_total"}  # fmt: skip
        if self.seen["differs behind a preemption"] > seen.get(names["preemptions"], 0):
            self.faults.append("more answers differ than requests were preempted")
        if not seen.get(names["preemptions"]):
            self.faults.append("nothing was preempted")
        return {
            "minutes": minutes, "clients": CLIENTS, "cases": len(self.cases),
            "right_alone": round(self.right, 3),
            "requests": sum(self.seen[kind] for kind in KINDS), "seen": dict(self.seen),
            "wrong": self.wrong, "stuck": stuck, "slowest_s": round(self.slowest, 1),
            "rss_mib": [round(part) for part in total],
            "rss_mib_by_tenth": [
                round(sum(self.memory[i * len(self.memory) // 10].values()) / 2**20)
                for i in range(10)
            ],
            "rss_mib_of_processes": [[round(n) for n in part.values()] for part in (early, late)],
            **{name: seen.get(series, 0.0) for name, series in names.items()},
            "faults": self.faults[:10],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--setting", default='{"preset": "5pct"}')
    parser.add_argument("--own-malloc", action="store_true", help="glibc as it is by itself")
    parser.add_argument("--out", type=Path, help="file of rows to append to")
    options = parser.parse_args()
    if options.own_malloc:
        GIVES_BACK.clear()
    machine = asdict(Machine.here())
    setting = json.loads(options.setting)
    with Server(
        tiny_model.main(BUILD / "tiny-vllm"), setting, BUILD / "soak.log", *FLAGS
    ) as server:
        asked = {"bench": "soak", "setting": setting, "malloc": dict(GIVES_BACK)}
        said = asked | Soak(server).run(options.minutes)
    print(json.dumps(said, indent=2))
    if options.out:
        append_line(options.out, json.dumps(said | {"machine": machine}))
    sys.exit(bool(said["faults"]))


if __name__ == "__main__":
    main()
