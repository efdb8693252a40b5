"""Benchmarks and patched models on the GPU that is none: run by tests/test_fake_gpu.py."""

import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from methods import block64

import visionpulse as vp
from visionpulse import torch_ops, workspace
from visionpulse.bench import ceilings, layers, rows, timing
from visionpulse.call import Call, Params
from visionpulse.schedule import Role
from visionpulse.serving.graphs import GraphLayer, GraphSteps
from visionpulse.serving.rows import RequestRow
from visionpulse.serving.setting import Engine, setting_of
from visionpulse.testing import CASES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = {
    "bench_layers.py": ("--budget", "1"),
    "bench_decode.py": ("--budget", "1", "--layers", "3", "--schedules", "dense,paper,lookback"),
    "bench_sweep.py": ("--budget", "1", "--sweep", "batch"),
    "bench_model.py": ("--budget", "4", "--layers", "2", "--prefill", "32", "--no-overhead"),
}
# the CPU that computes here has no kernel for it
ABSENT = "without torch-sdpa-cudnn: not available"


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts importable, on sizes that a CPU moves in a moment."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness
    import shapes

    monkeypatch.setattr(timing, "FLUSH_BYTES", 1 << 16)
    for sizes, size in ((ceilings._READ_BYTES, 1 << 16), (layers.LAST_CACHE, 1 << 16)):
        monkeypatch.setitem(sizes, "cuda", size)
    monkeypatch.setitem(ceilings._SIDE, "cuda", 16)
    monkeypatch.setattr(harness, "launches_of", lambda step, where: None)  # no profiler sees it
    monkeypatch.setitem(shapes.SHAPES, "b2-tiny", shapes.Shape("b2-tiny", 2, 200, 40))
    scheme = {name: getattr(block64, name) for name in ("dense", "anchor", "follower")}
    absent = SimpleNamespace(check=lambda: None, **scheme)  # its kernels are Triton's
    monkeypatch.setitem(sys.modules, "methods.block64_triton", absent)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_makes_its_rows(benchmarks, monkeypatch, tmp_path, capfd, script):
    out = tmp_path / "rows.jsonl"
    given = ("--device", "cuda", "--shapes", "b2-tiny", "--backends", "reference", "--rounds", "1")
    monkeypatch.setattr(sys, "argv", [script, *given, *SCRIPTS[script], "--out", str(out)])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    said = capfd.readouterr().err
    without = [line for line in said.splitlines() if "not available" in line]
    assert all(line.startswith(ABSENT) for line in without), said
    assert "without a graph" not in said, said
    names = {row.backend.split(":")[0] for row in rows.read(out)}
    assert names & {"reference", "ours"} and len(names) > 1


def test_the_launches_of_a_profile_run(benchmarks, monkeypatch, capfd):
    import profile_launches

    monkeypatch.setattr(profile_launches, "LAUNCHES", {"dense": "b2-tiny", "follower": "b2-tiny"})
    monkeypatch.setattr(profile_launches, "captured", lambda device: nullcontext())
    given = ["profile_launches", "--backends", "reference"]
    monkeypatch.setattr(sys, "argv", [*given, "--once"])
    assert profile_launches.main() == 0
    kernels = [profile_launches.Kernel(name, us) for name, us in
               (("vp_attend_bf16_d128_h8", 24.0), ("reduce_kernel", 80.0))]  # fmt: skip
    monkeypatch.setattr(profile_launches, "recorded", lambda rounds, *where: rounds())
    monkeypatch.setattr(profile_launches, "read", lambda path: ([], kernels * 20))
    monkeypatch.setattr(sys, "argv", given)
    assert profile_launches.main() == 0
    said = capfd.readouterr().out
    assert said.count("best 24.0 us, median 24.0 us") == 2 and said.count("20 launches") == 2
    monkeypatch.setattr(profile_launches, "read", lambda path: ([], []))
    assert profile_launches.main() == 2 and "saw no kernel" in capfd.readouterr().err


def test_the_device_refuses_what_a_gpu_refuses():
    """Else the checks beside this one could not fail."""
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    torch.cuda.set_sync_debug_mode("error")
    try:
        for read in (there.sum().item, there.nonzero, lambda: here.to("cuda"), there.cpu):
            with pytest.raises(RuntimeError, match="synchronizing"):
                read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = there * 2
        with pytest.raises(RuntimeError, match="capturing"):
            there.tolist()
    assert twice.isnan().all()
    there.fill_(3)
    graph.replay()
    assert (twice == 6).all()


SETTINGS = {
    "paper": {},
    "dense-anchor": {"anchor_output": "dense"},
    "lookback": {"schedule": "lookback", "refresh": 3},
    "per-layer": {"schedule": "per_layer"},
}


@pytest.mark.parametrize("static", (True, False), ids=("static", "growing"))
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_of_a_patched_model_reads_nothing_back(benchmarks, setting, static):
    """With a static cache it can be captured as well, padding on the left and all.

    With a growing one a mask would be read by transformers itself.
    """
    import bench_model
    from transformers import DynamicCache, StaticCache

    model = bench_model.model_of(3, torch.bfloat16, heads=4, dim=64, device="cuda")
    text = model.config.get_text_config()
    cache = StaticCache(config=text, max_cache_len=64) if static else DynamicCache(config=text)
    ids = torch.full((2, 40), 5, device="cuda")
    ids[:, 4:36] = bench_model.IMAGE
    mask = torch.ones(2, 64, dtype=torch.long, device="cuda")
    mask[0, :3] = 0
    token = torch.full((2, 1), 7, device="cuda")

    def seen(length):
        return {"attention_mask": mask[:, :length] if static else None, "past_key_values": cache}

    def step(length):
        model(input_ids=token, **seen(length))

    with torch.no_grad(), vp.patch(model, **SETTINGS[setting]) as session:
        session.set_visual_mask(ids == bench_model.IMAGE)
        embeds = model.get_input_embeddings()(ids)
        model.get_decoder()(inputs_embeds=embeds, **seen(40))
        step(41)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(42)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if static:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                step(43)
        assert session.stats.steps == 2 + static


SPANS = (((2, 30), (40, 60)), ((10, 90),))


def test_a_graph_of_a_serving_engine_follows_its_requests():
    """The steps between two replays wait for nothing, and the graph reads what they wrote."""
    q, kv = CASES["grouped"].build(torch.bfloat16, "cuda")[1:3]
    pages = [t.transpose(0, 1).flatten(1, 2).unflatten(1, (-1, 16)) for t in (kv.k, kv.v)]
    pages = [t.transpose(0, 1).contiguous() for t in pages]  # [P, G, page, D]
    table = torch.arange(12, dtype=torch.int32, device="cuda").view(2, 6)
    lengths = torch.full((2,), 96, dtype=torch.int32, device="cuda")
    facts = Engine(full=(True,) * 2, heads=8, device="cuda", has_graphs=True)
    asked = {"anchor": 0, "ratio": [0.1, 0.5], "backend": "reference", "budget": "random:3"}
    steps = GraphSteps(setting_of(asked, facts), 2, 96, "cuda", max_runs=4)
    layers = [GraphLayer(steps, role, 0.125) for role in (Role.ANCHOR, Role.FOLLOWER)]
    outs = [torch.zeros_like(q) for _ in layers]

    def run(step):
        for layer, out in zip(layers, outs, strict=True):
            layer.run(step, q, *pages, out)

    run(steps.make([], 2, table, lengths))  # warms up
    held, graph = steps.make([], 2, table, lengths), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(held)
    for spans in (SPANS, SPANS[::-1], (SPANS[0], ()), ((), ())):
        rows = [RequestRow(f"{spans}{i}", own) for i, own in enumerate(spans)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.make(rows, 2, table, lengths)
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts = held.buffers.selection.counts.tolist()
        assert [count > 0 for count in counts] == [bool(own) for own in spans]
        visual = vp.VisualTokens.from_spans(spans, device="cuda")
        paged = vp.PagedKVCache(*pages, table, lengths, layout="HND")
        kept = held.buffers.selection
        wanted = vp.attend(q, paged, visual, kept, scale=0.125, backend="reference")
        assert all(torch.equal(out.cpu(), wanted.cpu()) for out in outs)


def test_a_compiled_op_holds_no_memory_after_it(monkeypatch):
    """It may have run in the pool of a graph, where torch refuses what outlives it."""
    q, kv, visual = CASES["grouped"].build(torch.bfloat16, "cuda")[1:4]
    monkeypatch.setattr(workspace, "default", None)
    call = Call(q, kv, Params(0.125, tau=0.4, r_min=0.05, r_max=0.5, k_max=43), visual)
    fields = torch_ops.fields_of(call) | {"backend": "reference"}
    dense = torch_ops._attend(fields)
    out, indices, counts, *_ = torch_ops._decode(fields)
    followed = torch_ops._attend(fields | {"indices": indices, "counts": counts})
    assert torch.equal(out.cpu(), followed.cpu()) and not torch.equal(out.cpu(), dense.cpu())
