"""The scripts of benchmarks/: each runs on a small problem, and each gate can fail."""

import re
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from visionpulse.bench import rows
from visionpulse.bench.timing import Times

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results" / "cpu.jsonl"


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a script as __main__, in this process: torch takes longer to import than they run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def give(script, *arguments, ok=True):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        said = "".join(capfd.readouterr())
        assert (code == 0) == ok, said
        return said

    return give


def made(backend="cpu:paper", ratio=4.0, us=500.0, machine_of=None, **changes):
    """A row as a script writes it."""
    import torch

    machine = rows.Machine.here()
    times = {backend: Times((us / 1e6,)), "torch-sdpa-grouped": Times((ratio * us / 1e6,))}
    (row, _) = rows.rows_of(
        "decode", "b1-8k", torch.float32, times, machine, baseline="torch-sdpa-grouped"
    )
    return replace(row, machine=asdict(machine) | (machine_of or {}), **changes)


@pytest.fixture
def files(tmp_path):
    def give(old, new):
        paths = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
        for path, row in zip(paths, (old, new), strict=True):
            rows.write(path, [row], keep=False)
        return paths

    return give


SMALL = ("--device", "cpu", "--layers", "3", "--rounds", "1", "--budget", "32", "--quiet")


def test_a_decode_step_is_timed_under_every_schedule(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    run("bench_decode.py", "--shapes", "b1-1k", *SMALL, "--baselines", "default", "--out", out)
    found = {row.backend: row for row in rows.read(out)}
    schedules = {name for name in found if name.startswith("cpu:")}
    assert schedules == {
        f"cpu:{name}"
        for name in (
            "dense", "paper", "paper-dense-anchor", "paper-anchors-8-17", "lookback", "per_layer"
        )
    }  # fmt: skip
    assert {"torch-sdpa-grouped", "transformers-sdpa", "published-block64"} <= set(found)
    # all layers of the dense step must move more than those of a sparse one
    order = [found[f"cpu:{name}"].bytes for name in ("dense", "per_layer", "paper", "lookback")]
    assert order[0] == max(order) and order[-1] == min(order)
    assert found["published-block64"].facts["composed"].count("x published-block64") == 3
    assert all(row.checked and row.ceiling_gb_s > 0 for row in found.values())


def test_a_patched_model_is_timed_against_the_unpatched_one(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    more = ("--dtypes", "fp32", "--prefill", "64", "--no-overhead", "--distinct", "2")
    run("bench_model.py", "--shapes", "b1-1k", *SMALL, *more, "--out", out)
    found = {(row.bench, row.backend): row for row in rows.read(out)}
    theirs = {"transformers:sdpa", "transformers:eager"}
    for bench in ("model-step", "model-attention"):
        assert theirs < {name for kind, name in found if kind == bench}
    assert {name for kind, name in found if kind == "model-prefill"} == theirs | {"ours:paper"}
    step = found["model-step", "ours:paper"]
    assert step.baseline in theirs and step.facts["layers"] == 3
    assert step.facts["distinct_layers"] == 2 and step.facts["weights"] == "unpacked"
    assert step.facts["tokens_s"] == pytest.approx(1e6 / step.us_best, rel=1e-2)
    rare = found["model-step", "ours:paper-1%"]
    assert (step.facts["retention"], rare.facts["retention"]) == (0.05, 0.01)


def test_layers_that_are_repeated_share_their_weights_and_the_config_that_patches_them(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_model

    model = bench_model.model_of(5, torch.float32, distinct=2)
    decoder = model.get_decoder()
    attentions = [layer.self_attn for layer in decoder.layers]
    assert [attention.layer_idx for attention in attentions] == [0, 1, 2, 3, 4]
    assert len({id(attention.q_proj.weight) for attention in attentions}) == 2
    assert all(attention.config is decoder.config for attention in attentions)


def test_rounds_of_lossless_decoding_are_timed(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    more = ("--dtypes", "fp32", "--keys", "64", "--round-rounds", "2")
    run("bench_lossless.py", "--shapes", "b1-1k", *SMALL, *more, "--out", out)
    found = {(row.bench, row.backend): row for row in rows.read(out)}
    rounds = {name for kind, name in found if kind == "lossless-round"}
    assert rounds == {"4 drafted", "8 drafted", "auto, 15 drafted", "one forward"}
    step = found["lossless-step", "ours:3 drafted"]
    assert (step.scaled, step.baseline) == (0.25, "ours:dense")
    assert 0 < step.facts["predicted"] < 4


@pytest.mark.parametrize(("packing", "steps"), [("int8", 254), ("int4", 15)])
def test_packed_weights_are_the_layers_within_half_a_step(monkeypatch, packing, steps):
    import torch

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import model_weights

    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    packed = model_weights.PACKINGS[packing](layer.weight.detach())
    inputs = torch.eye(256, dtype=torch.bfloat16)  # so that the outputs are the weights
    found, expected = packed(inputs[None])[0].float(), layer(inputs).float()
    step = 2 * layer.weight.abs().max() / steps
    # the scales are bfloat16 too
    assert (found - expected).abs().max() <= step / 2 + 2**-8 * expected.abs().max()
    assert packed.packed_bytes == 64 * 256 * (1 if packing == "int8" else 0.5)


def test_every_stage_is_timed_against_a_baseline_of_its_own(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    small = ("--device", "cpu", "--rounds", "1", "--budget", "32", "--quiet", "--dtypes", "fp32")
    run("bench_layers.py", "--shapes", "b1-1k", *small, "--out", out)
    found = {(row.bench, row.backend): row for row in rows.read(out)}
    ours = {stage: row for (stage, name), row in found.items() if name == "cpu"}
    assert {stage: row.baseline for stage, row in ours.items()} == {
        "dense": "torch-sdpa-grouped", "score": "torch-score", "select": "torch-topk",
        "anchor": "torch-visionpulse", "follower": "torch-sdpa-grouped",
    }  # fmt: skip
    assert all((row.bench, row.baseline) in found for row in ours.values())
    # the fused anchor moves what score moves and V of fewer keys than the dense layer
    assert ours["score"].bytes < ours["anchor"].bytes < ours["dense"].bytes


def test_a_cache_of_8_bits_is_timed_beside_the_same_numbers_in_16(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    small = ("--device", "cpu", "--rounds", "1", "--budget", "32", "--quiet", "--dtypes", "bf16")
    peers = ("--baselines", "torch-sdpa-grouped")
    run("bench_layers.py", "--shapes", "b1-1k-fp8", *small, *peers, "--out", out)
    found = {(row.bench, row.backend): row for row in rows.read(out)}
    for stage in ("dense", "anchor", "follower"):
        eight, wide = found[stage, "cpu"], found[stage, "cpu:wide"]
        assert (eight.facts.get("cache"), wide.facts.get("cache")) == ("fp8", None)
        assert eight.bytes < 0.6 * wide.bytes
    peer = found["dense", "torch-sdpa-grouped"]
    assert "cache" not in peer.facts and peer.bytes == found["dense", "cpu:wide"].bytes


GOAL_SHAPE = "b1-32k-t512"


def test_the_goals_are_ratios_of_what_was_timed(run, tmp_path, monkeypatch):
    import shapes

    monkeypatch.setitem(shapes.SHAPES, GOAL_SHAPE, shapes.Shape(GOAL_SHAPE, 1, 1000, 24))
    out = tmp_path / "rows.jsonl"
    small = ("--device", "cpu", "--rounds", "1", "--budget", "32", "--quiet", "--out", out)
    sdpa = ("--baselines", "torch-sdpa-grouped")
    # a share of 100 lets any ratio pass: this is no place for a clock
    said = run("bench_layers.py", "--goals", "100", "--shapes", GOAL_SHAPE, *small, *sdpa)
    assert len(re.findall(f"^holds  {GOAL_SHAPE} bf16  ", said, re.M)) == 8, said
    assert len(re.findall("  pages of (?:16|64|128) over contiguous: ", said)) == 3
    found = {row.backend: row for row in rows.read(out) if row.bench == "dense"}
    assert 0.9 * found["cpu"].bytes < found["stream-read"].bytes < found["cpu"].bytes
    run("bench_layers.py", "--goals", "--shapes", "b1-1k", *small, *sdpa, ok=False)  # states none


def test_two_threads_are_timed_beside_one_and_beside_the_reads(run, tmp_path, monkeypatch):
    import shapes
    import torch

    monkeypatch.setitem(shapes.SHAPES, GOAL_SHAPE, shapes.Shape(GOAL_SHAPE, 1, 1000, 24))
    out, before = tmp_path / "rows.jsonl", torch.get_num_threads()
    small = ("--device", "cpu", "--rounds", "1", "--budget", "32", "--quiet", "--out", out)
    asked = ("--goals", "100", "--shapes", GOAL_SHAPE, "--threads", "2", "--baselines", "none")
    try:
        said = run("bench_layers.py", *asked, *small)
    finally:
        torch.set_num_threads(before)
    assert re.findall(f"^holds  {GOAL_SHAPE} bf16  (two threads over one, .*?):", said, re.M) == [
        "two threads over one, dense as a stream read",
        "two threads over one, follower as a gather",
    ]
    found = {(row.bench, row.backend) for row in rows.read(out)}
    pairs = [("dense", "cpu"), ("dense", "stream-read"), ("follower", "gather-read")]
    assert {(stage, f"{name}:one-thread") for stage, name in pairs} <= found


def test_a_cpu_backend_that_cannot_run_is_why_no_goal_is_judged(run, monkeypatch):
    from visionpulse.backends import get

    why = "the compiled module was built with another csrc/cpu/bind.h"
    monkeypatch.setattr(type(get("cpu")), "unavailable", lambda self: why)
    small = ("--device", "cpu", "--rounds", "1", "--budget", "32", "--quiet", "--goals")
    assert f"backend cpu cannot run here: {why}" in run(
        "bench_layers.py", *small, "--shapes", "b1-1k", ok=False
    )


def test_a_goal_is_short_on_its_own_side(run):
    import bench_layers
    import torch

    def lines(**best):
        times = {name: Times((1.0,)) for name in ("dense/stream-read", "dense/cpu")}
        times["anchor/cpu:dense-output"] = Times((1.05,))
        times |= {f"dense/{name.replace('_', '-')}": Times((t,)) for name, t in best.items()}
        return list(bench_layers.judged(times, GOAL_SHAPE, torch.float32, 0.0))

    assert [holds for holds, _ in lines()] == [True, True]
    short = lines(stream_read=0.6, cpu=1.0)
    assert [holds for holds, _ in short] == [False, True] and short[0][1].startswith("SHORT")
    assert [holds for holds, _ in lines(cpu=0.9)] == [True, False]


@pytest.mark.parametrize("sweep", ["retention", "batch"])
def test_a_sweep_says_from_where_a_follower_pays(run, tmp_path, sweep):
    out, drawn = tmp_path / "rows.jsonl", tmp_path / "plots"
    arguments = [
        "--device",
        "cpu",
        "--sweep",
        sweep,
        "--shapes",
        "b1-1k",
        "--rounds",
        "1",
        "--budget",
        "32",
    ]
    said = run("bench_sweep.py", *arguments, "--out", out)
    assert re.search(r"b1-1k cpu: a follower beats our dense layer (never|up to)", said)
    found = [row for row in rows.read(out) if "follower" in row.backend]
    kept = [row.facts["retention"] for row in found]
    assert kept == sorted(kept) and len(kept) == (8 if sweep == "retention" else 1)
    pytest.importorskip("matplotlib")
    run("bench_sweep.py", "--from-rows", out, "--plots", drawn, "--dtypes", "bf16")
    assert (drawn / "retention.png").stat().st_size > 10_000


def test_a_profile_of_a_step_has_its_stages(run, tmp_path):
    trace = tmp_path / "step.json"
    small = ("--device", "cpu", "--shape", "b1-1k", "--layers", "4", "--budget", "32", "--staged")
    said = run("profile_decode.py", *small, "--torch-profiler", trace)
    counts = {line.split()[0]: line.split()[1] for line in said.splitlines() if "%" in line}
    assert counts == {
        "step": "1", "dense": "1", "anchor": "1", "follower": "2",
        "score": "1", "select": "1", "attend": "1",
    }  # fmt: skip
    assert run("profile_decode.py", "--read", trace).splitlines()[0].startswith("stage")


def test_comparing_shows_ratios_and_noise(run, files):
    old, new = files(made(us=100), made(us=50))
    said = run("compare.py", old, new)
    assert "2.00x" in said and "faster" in said and "0 %" in said
    noisy = replace(made(us=50), us_p20=50.0, us_p80=200.0)
    assert "within noise" in run("compare.py", *files(made(us=100), noisy))
    assert "no row in common" in run("compare.py", *files(made(), made("cpu:lookback")), ok=False)


def test_the_gate_holds_ratios_not_times(run, files):
    run("compare.py", *files(made(ratio=4, us=200), made(ratio=2.5, us=900)), "--gate", "0.6")
    said = run("compare.py", *files(made(ratio=4), made(ratio=2.3)), "--gate", "0.6", ok=False)
    assert "2.30x against torch-sdpa-grouped, the gate is 2.40x" in said


def test_the_gate_leaves_ops_alone_that_are_too_short_to_hold(run, files):
    old, new = files(made(ratio=4, us=90), made(ratio=1, us=360))
    assert "no gate" in run("compare.py", old, new, "--gate", "0.6")


@pytest.mark.parametrize("other", ({"isa": "neon"}, {"device": "Another CPU, 2 cores"}))
def test_the_gate_says_that_no_row_is_of_this_cpu(run, files, other):
    old, new = files(made(ratio=4, machine_of=other), made(ratio=1))
    said = run("compare.py", old, new, "--gate", "0.6")
    assert "no gate" in said and next(iter(other.values())) in said


def test_a_gate_that_held_nothing_is_an_error(run, files):
    old, new = files(made("cpu:paper"), made("cpu:lookback"))
    assert "is it the right script" in run("compare.py", old, new, "--gate", "0.6", ok=False)


def test_the_readme_shows_the_committed_rows(run):
    run("readme_numbers.py", "--check")


def test_deleting_any_row_the_readme_shows_fails_its_check(run, tmp_path):
    shown = {"transformers-eager", "transformers-sdpa", "published-block64", "torch-sdpa-grouped"}
    shown |= {"torch-visionpulse", "vllm-cpu", "cpu:dense", "cpu:paper", "cpu:lookback"}
    found = rows.read(RESULTS)
    places = [
        i
        for i, row in enumerate(found)
        if row.bench == "decode" and row.shape in ("b1-8k", "b1-32k") and row.backend in shown
    ]
    machines = {row.where for row in found if row.bench == "decode"}
    with_vllm = {row.where for row in found if row.backend == "vllm-cpu" and row.bench == "decode"}
    assert len(places) == 4 * ((len(shown) - 1) * len(machines) + len(with_vllm))
    for gone in places:
        rows.write(tmp_path / "cpu.jsonl", found[:gone] + found[gone + 1 :], keep=False)
        said = run("readme_numbers.py", "--check", "--results", tmp_path, ok=False)
        assert f"has no row '{' '.join(found[gone].key)}'" in said


def test_changing_a_row_the_readme_shows_fails_its_check(run, tmp_path):
    found = rows.read(RESULTS)
    slower = [
        replace(row, us_best=row.us_best * 2) if row.backend == "cpu:paper" else row
        for row in found
    ]
    rows.write(tmp_path / "cpu.jsonl", slower)
    page = RESULTS.parents[2] / "README.md"
    said = run("readme_numbers.py", "--check", "--readme", page, "--results", tmp_path, ok=False)
    assert "does not show the committed rows" in said


def test_committed_rows_are_whole():
    for path in sorted(RESULTS.parent.glob("[cg]pu*.jsonl")):  # the others are no timings
        for row in rows.read(path):
            assert row.checked and row.machine["commit"] and row.machine["device"], row.key
            assert row.us_best <= row.us_p20 <= row.us_p50 <= row.us_p80, row.key
            assert row.baseline and row.ratio and row.ceiling, row.key
