"""What the benchmarks do on a GPU, torch.cuda stood in for: order and fallbacks, no numbers."""

import argparse
import contextlib
import sys
from pathlib import Path

import pytest
import torch

from visionpulse.bench import rows, timing

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
        "Event": Event, "is_available": lambda: True, "current_stream": lambda: "before",
        "set_stream": lambda stream: device.log.append(f"back to {stream}"),
        "empty_cache": device.note("empty cache"),
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


def test_a_layer_is_a_graph_of_one_and_a_graph_of_several_with_inputs_of_their_own(bench, gpu):
    seen = []
    layer = bench.captured_layers(seen.append, 36)
    assert seen == [0] * 3 + [*range(9)] * 3 and gpu.log.count("capture") == 2
    layer(7)
    assert gpu.log[-1] == "replay" and len(seen) == 30
    assert bench.captured_layers(seen.append, 2).layers == 2


def test_the_time_of_a_layer_is_without_what_a_graph_costs_by_itself(bench, gpu, monkeypatch):
    taken = {"ours": (100e-6, 104e-6), "ours by itself": (20e-6, 26e-6), "theirs": (7e-6, 9e-6)}

    def timed(variants, *args, **kwargs):
        return {name: timing.Times(taken[name]) for name in variants}

    harness = sys.modules["harness"]
    monkeypatch.setattr(harness, "interleaved", timed)
    nothing = argparse.Namespace(variants=dict, limits=lambda times: None)
    monkeypatch.setattr(harness, "Ceilings", lambda *args: nothing)
    ours = bench.captured_layers(lambda turn: None, 9)
    times, _ = bench.time({"ours": ours, "theirs": lambda turn: None}, torch.bfloat16, 256)
    assert set(times) == {"ours", "theirs"}
    assert times["ours"].best == pytest.approx(10e-6)
    assert times["ours"].launch == pytest.approx(10e-6)
    assert times["theirs"] == timing.Times(taken["theirs"])


def test_the_difference_of_two_graphs_is_that_of_their_layers_alone():
    one, many = timing.Times((12e-6, 30e-6)), timing.Times((60e-6, 76e-6))
    layer = timing.per_layer(one, many, 9)
    assert layer.seconds == pytest.approx((6e-6, 8e-6)) and layer.launch == pytest.approx(6e-6)
    # noise in the graph of one moves no layer, and a launch is never below nothing
    assert timing.per_layer(timing.Times((12e-6, 1.0)), many, 9) == layer
    assert timing.per_layer(timing.Times((5e-6,)), many, 2).launch == 0
    with pytest.raises(ValueError, match="is the device shared"):
        timing.per_layer(many, one, 9)
    with pytest.raises(ValueError, match="at least 2 layers"):
        timing.per_layer(one, many, 1)


def test_a_form_that_reads_the_device_runs_without_a_graph_and_says_so(bench, gpu, capsys):
    def reads(turn):
        gpu.log.append(f"call {turn}")
        if gpu.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    layer = bench.captured_layers(reads, 2, "flashinfer")
    said = capsys.readouterr().err
    assert "flashinfer is timed without a graph" in said and "operation not permitted" in said
    assert gpu.log[-2:] == ["back to before", "synchronize"]
    layer(5)
    assert gpu.log[-1] == "call 5"


def test_a_baseline_that_cannot_run_is_named_and_the_others_stay(bench, capsys):
    def lacks_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB")

    made, missing = bench.baselines({"theirs": lacks_memory, "plain": lambda: lambda turn: None})
    assert list(made) == ["plain"] and missing == {"theirs"} and not bench.failed
    assert "without theirs: not available, OutOfMemoryError" in capsys.readouterr().err


def test_a_part_that_fails_keeps_the_rows_of_the_others(bench, tmp_path, capsys):
    machine = rows.Machine("a GPU", "sm_90", 1, 0.0, "", {})
    bench.options.out = str(tmp_path / "rows.jsonl")
    with bench.part("b1-1k"):
        times = {"cuda": timing.Times((1e-6,))}
        bench.rows += rows.rows_of("dense", "b1-1k", torch.bfloat16, times, machine, baseline="")
    with bench.part("b1-2k"):
        with bench.part("triton"):
            raise RuntimeError("no kernel image")
        raise RuntimeError("illegal memory access")
    assert [row.shape for row in rows.read(bench.options.out)] == ["b1-1k"]
    with pytest.raises(SystemExit, match="failed: triton, b1-2k"):
        bench.finish()
    assert "illegal memory access" in capsys.readouterr().err


def test_the_second_level_cache_is_emptied_by_reading_before_each_timed_call(gpu, monkeypatch):
    class Flush:
        def sum(self):
            gpu.log.append("read")

    def zeros(size, **kwargs):
        assert 4 * size == timing.FLUSH_BYTES and kwargs["device"] == "cuda"
        return Flush()

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1 << 20)  # made anew: other tests have one
    variants = {"ours": lambda turn: gpu.log.append("call")}
    times = timing.interleaved(variants, 2, warmup=0, device="cuda")
    assert gpu.log == ["read", "event", "call", "event", "wait"] * 2
    assert times["ours"].best == 2.5e-3
