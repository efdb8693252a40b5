"""What the benchmarks do on a GPU, torch.cuda stood in for: order and fallbacks, no numbers."""

import argparse
import contextlib
import sys
from pathlib import Path

import pytest
import torch

from visionpulse.testing import timing

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


class Device:
    """A GPU that only notes what it was told."""

    def __init__(self):
        self.log, self.is_capturing = [], False

    def note(self, what):
        return lambda *args, **kwargs: self.log.append(what)

    @contextlib.contextmanager
    def graph(self, graph, pool):
        self.log.append("capture")
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append("side stream")
        yield


@pytest.fixture
def gpu(monkeypatch):
    device = Device()

    class Graph:
        def replay(self):
            device.log.append("replay")

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            device.log.append("event")
            self.at = len(device.log)

        def synchronize(self):
            device.log.append("wait")

        def elapsed_time(self, other):
            return 2.5  # milliseconds

    fakes = {
        "synchronize": device.note("synchronize"), "Stream": object, "stream": device.stream,
        "graph": device.graph, "CUDAGraph": Graph, "graph_pool_handle": lambda: "pool",
        "Event": Event, "is_available": lambda: True,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return device


@pytest.fixture
def bench(monkeypatch, gpu):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(harness.Machine, "here", lambda device: None)
    made = harness.Bench(argparse.ArgumentParser(), shapes="b1-1k", dtypes="bf16")
    assert made.device.type == "cuda"
    return made


def test_a_step_is_warmed_beside_then_captured_then_replayed(bench, gpu):
    step = bench.captured(lambda: gpu.log.append("step"))
    before = ["synchronize", "side stream", "step", "step", "synchronize"]
    assert gpu.log == [*before, "capture", "step", "synchronize"]
    gpu.log.clear()
    step(0)
    assert gpu.log == ["replay"]


def test_every_set_of_inputs_has_its_graph(bench, gpu):
    seen = []
    layer = bench.captured_layers(seen.append, 3)
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2] and gpu.log.count("capture") == 3
    layer(7)
    assert gpu.log[-1] == "replay" and len(seen) == 9


def test_a_form_that_reads_the_device_runs_without_a_graph_and_says_so(bench, gpu, capsys):
    def reads(turn):
        gpu.log.append(f"call {turn}")
        if gpu.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    layer = bench.captured_layers(reads, 2, "flashinfer")
    assert "flashinfer is timed without a graph: operation not permitted" in capsys.readouterr().err
    layer(5)
    assert gpu.log[-1] == "call 5"


def test_the_second_level_cache_is_overwritten_before_each_timed_call(gpu, monkeypatch):
    class Flush:
        def zero_(self):
            gpu.log.append("flush")

    def empty(size, **kwargs):
        assert size == timing.FLUSH_BYTES and kwargs["device"] == "cuda"
        return Flush()

    monkeypatch.setattr(torch, "empty", empty)
    variants = {"ours": lambda turn: gpu.log.append("call")}
    times = timing.interleaved(variants, 2, warmup=0, device="cuda")
    assert gpu.log == ["flush", "event", "call", "event", "wait"] * 2
    assert times["ours"].best == 2.5e-3
