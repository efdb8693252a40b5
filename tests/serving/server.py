"""`vllm serve` as a child process: started, asked for its metrics, stopped."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import environment

STARTS_IN = 420  # seconds on a machine with other work
# glibc gives large blocks back when they are freed, so that memory which grows is memory held.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
FLAGS = (
    "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager",
    "--limit-mm-per-prompt", '{"image": 2, "video": 0}',
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """Runs as long as the `with` block."""

    def __init__(self, model: Path, setting: dict | None, log: Path, *flags: str) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        asked = ["--additional-config", json.dumps({"visionpulse": setting})] if setting else []
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [str(environment.python()), "-m", "vllm.entrypoints.cli.main", "serve", str(model),
                 "--host", "127.0.0.1", "--port", str(self.port), *FLAGS, *asked, *flags],
                env={"VLLM_CPU_KVCACHE_SPACE": "1", **GIVES_BACK, **os.environ, **quiet},
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Server":
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _wait(self) -> None:
        deadline = time.monotonic() + STARTS_IN
        while True:
            try:
                self.get("/health")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"not served:\n{self.log.read_text()[-6000:]}") from None
                time.sleep(0.5)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as said:
            return said.read().decode()

    def metrics(self) -> dict[str, float]:
        """The sum over labels of each series, and each `{reason=...}` of its own."""
        found: dict[str, float] = {}
        for name, labels, value in re.findall(
            r"^([\w:]+)(?:\{(.*)\})? (\S+)$", self.get("/metrics"), re.M
        ):
            reason = re.search(r'reason="([^"]*)"', labels)
            for key in (name, f"{name} {reason[1]}" if reason else name)[: 1 + bool(reason)]:
                found[key] = found.get(key, 0.0) + float(value)
        return found

    def until(self, name: str, is_right, seconds: float = 120) -> float:
        """Wait for a number on /metrics, which workers write once a second."""
        deadline = time.monotonic() + seconds
        while not is_right(value := self.metrics().get(name, 0.0)):
            assert time.monotonic() < deadline, f"{name} is {value}"
            time.sleep(0.5)
        return value

    def stop(self) -> int:
        """Ask it to end, as an operator does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def kill(self) -> None:
        """End the process and its children, however they are."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
