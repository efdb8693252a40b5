"""The bench verb, the rows, and the plots made from them: on sizes that take no time."""

import io
import json
import sys
import xml.etree.ElementTree
from dataclasses import replace

import pytest
import torch

from visionpulse import cli as command_line
from visionpulse.bench import cost, layers, plots, rows, timing
from visionpulse.bench.ceilings import measure, multiplied_as
from visionpulse.bench.progress import progress_bar
from visionpulse.bench.report import PLAIN, TODAY, WIDE
from visionpulse.cli.bench import main, threads_of

TINY = [
    "--device",
    "cpu",
    "--contexts",
    "256,512",
    "--text",
    "16",
    "--seconds",
    "0",
    "--no-progress",
]


def make(bench="decode", backend="cpu", seconds=(1e-3, 2e-3), **changes):
    times = {backend: timing.Times(seconds), "plain": timing.Times((4e-3, 5e-3))}
    (row, _) = rows.rows_of(
        bench, "b1-1k", torch.float32, times, rows.Machine.here(), baseline="plain",
        bytes_={backend: 2_000_000}, ceiling=rows.Ceiling("read of 1 MiB", 8.0),
    )  # fmt: skip
    return replace(row, **changes)


def assert_memory(printed, data):
    lines = [line.split() for line in printed.split("Memory: ")[1].splitlines()]
    for step in data["steps_seconds"]:
        whole, half = (step["memory"][name] for name in ("model", "fp8"))
        assert whole["held"] == 36 * 2 * 2 * 8 * 128 * (step["visual"] + 16)
        assert half["held"] == whole["held"] // 2 + 36 * 2 * 4 * 8
        moved = whole["moved"]
        assert moved["lookback"] < moved["paper"] < moved["dense"]
        mib = f"{whole['held'] / 2**20:.1f}"
        assert [str(step["visual"]), "bf16", mib, "MiB"] in [line[:4] for line in lines]
        assert [str(step["visual"]), "fp8"] in [line[:2] for line in lines]


def test_the_verb_answers_in_a_table_a_file_and_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert command_line.main(["bench", *TINY, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "qwen3-vl-4b, 36 layers" in printed and "ceilings: read" in printed
    assert max(map(len, printed.split("written:")[0].splitlines())) <= 80
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["config"]["tau"] == 0.4 and data["config"]["ratio"] == [0.05, 0.1]
    assert [step["visual"] for step in data["steps_seconds"]] == [256, 512]
    for step in data["steps_seconds"]:
        assert set(step["attention"]) == {TODAY, PLAIN, "dense", "paper"}
        assert all(seconds > 0 for seconds in step["attention"].values())
        pays = step["lossless"]
        assert list(pays) == ["0.8", "0.9", "0.95", "0.99"] and step["attention_over_weights"] > 0
        assert pays["0.99"]["speed"] >= pays["0.8"]["speed"] > 0
    assert "Lossless decoding over our dense steps" in printed
    assert_memory(printed, data)
    backends = {row["backend"] for row in data["rows"]}
    assert backends == {TODAY, PLAIN, "dense", "anchor", "follower"}
    assert all(row["pct_ceiling"] > 0 and row["ratio"] > 0 for row in data["rows"])
    for name in ("roofline", "latency"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "svg" in xml.etree.ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag


def test_a_cache_of_8_bits_is_measured_beside_one_of_the_dtype(tmp_path, capsys):
    options = [*TINY[:2], "--contexts", "256", *TINY[4:], "--out", str(tmp_path), "--no-plots"]
    assert main([*options, "--cache", "fp8", "--preset", "5pct"]) == 0
    printed = capsys.readouterr().out
    assert "bf16, cache of 8 bits" in printed and "Lossless" not in printed
    assert "with a cache of 8 bits over one of bf16:" in printed
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["config"]["cache"] == "fp8"
    assert_memory(printed, data)
    (step,) = data["steps_seconds"]
    assert "lossless" not in step and step["attention_over_weights"] > 0
    found = {row["backend"]: row for row in data["rows"]}
    assert set(found) == {TODAY, PLAIN, WIDE, "dense", "anchor", "follower"}
    assert {row["shape"] for row in data["rows"]} == {"b1-256-fp8"}
    assert {n for n, row in found.items() if row["facts"].get("cache") == "fp8"} == {
        "dense", "anchor", "follower"
    }  # fmt: skip
    keys = 2 * 8 * 128 * (256 + 16)  # of K and V; queries and outputs are of bf16
    assert found[WIDE]["bytes"] - found["dense"]["bytes"] == keys - 2 * 4 * 8
    assert found[PLAIN]["bytes"] == found[WIDE]["bytes"]


def test_layers_of_8_bits_hold_the_numbers_of_the_wide_ones():
    shape = layers.Shape("s", 2, 64, 8, heads=4, kv_heads=2, head_dim=16, cache="fp8")
    made = layers.Layers.make(shape, torch.bfloat16, layers=2)
    (_, kv), (_, wide) = made.at(1), made.wide_at(1)
    assert kv.dtype == torch.float8_e4m3fn and wide.dtype == torch.bfloat16
    for small, scale, large in ((kv.k, kv.k_scale, wide.k), (kv.v, kv.v_scale, wide.v)):
        read = small.float() * scale[:, None, None]
        # half a step of 3 bits, or half of the smallest step
        torch.testing.assert_close(read, large.float(), rtol=2**-4, atol=float(scale.max()) * 2**-9)
    assert shape.cache_bytes(torch.bfloat16) == kv.k.nbytes + kv.v.nbytes + 2 * 2 * 4
    assert {t.data_ptr() for t in (kv.k, kv.v, wide.k)} <= {t.data_ptr() for t in made.memory(1)}


def test_the_speed_of_lookback_comes_with_its_condition(tmp_path, capsys):
    main([*TINY, "--schedule", "lookback", "--out", str(tmp_path), "--no-plots"])
    assert "breaks some models" in capsys.readouterr().out


def test_a_step_adds_its_layers_up(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
        )
    )  # fmt: skip
    main([*TINY, "--model", str(config), "--out", str(tmp_path), "--no-plots"])
    data = json.loads((tmp_path / "bench.json").read_text())
    best = {(r["shape"], r["backend"]): r["us_best"] / 1e6 for r in data["rows"]}
    shape = data["rows"][0]["shape"]
    attention = data["steps_seconds"][0]["attention"]
    # four layers: one dense, the anchor at 4 * 17 // 36 = 1, two followers
    parts = best[shape, "dense"] + best[shape, "anchor"] + 2 * best[shape, "follower"]
    assert attention["paper"] == pytest.approx(parts, rel=1e-3)
    assert attention[TODAY] == pytest.approx(4 * best[shape, TODAY], rel=1e-3)
    assert "4 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--model", "gpt-0"], "known: qwen3-vl-4b"),
        (["--contexts", "many"], "8k or 5000, got 'many'"),
        (["--retention", "0"], "above 0 and at most 1"),
        (["--preset", "7pct"], "no preset '7pct'"),
        (["--schedule", "never"], "unknown schedule 'never'"),
    ],
)
def test_the_verb_refuses_with_a_way_out(wrong, words, capsys):
    assert main(wrong) == 2
    assert words in capsys.readouterr().err


def test_a_busy_machine_is_measured_on_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert threads_of(load=0.1) == 8
    assert threads_of(load=3.0) == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_stays_on_its_line_and_goes_away(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    tick = progress_bar()
    tick("8k", 1, 2)
    tick("16k", 2, 2)
    said = sys.stderr.getvalue()
    assert "8k:  50%" in said and "16k: 100%" in said and "\n" not in said
    assert not said.rsplit("\r", 2)[1].strip()  # the last thing drawn is an empty line


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_no_progress_bar_off_a_terminal_or_without_tqdm(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr())
    if stderr is Terminal:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    progress_bar()("8k", 1, 2)
    progress_bar(on=False)("8k", 1, 2)
    assert not sys.stderr.getvalue()


def test_a_row_has_its_rate_ceiling_and_ratio():
    row = make()
    assert row.gb_s == pytest.approx(2.0) and row.pct_ceiling == pytest.approx(25.0)
    assert row.ratio == pytest.approx(4.0) and row.baseline == "plain"
    assert row.noise == pytest.approx(1.0)
    assert row.machine["threads"] == 1 and "torch" in row.machine["versions"]


def test_rows_come_back_from_a_file_and_replace_their_like(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    first, other = make(), make(bench="sweep")
    rows.write(path, [first, other])
    assert rows.read(path) == [first, other]
    again = make(seconds=(3e-3, 3e-3))
    rows.write(path, [again])
    assert rows.read(path) == [again, other]
    rows.write(path, [other], keep=False)
    assert rows.read(path) == [other]


def test_a_broken_results_file_says_where(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\nnot json\n"[3:])
    with pytest.raises(ValueError, match=r"rows.jsonl:1 is no JSON line"):
        rows.read(path)
    path.write_text('{"speed": 3}\n')
    with pytest.raises(ValueError, match=r"unknown fields speed"):
        rows.read(path)


def test_a_table_is_a_view_of_its_rows():
    lines = rows.table([make(), make(bench="sweep", ratio=None)]).splitlines()
    assert lines[0].split()[:3] == ["bench", "shape", "backend"]
    assert "4.00x" in lines[1] and "1,000.0" in lines[1]
    assert " - " in lines[2]


def test_ceilings_are_positive_and_named():
    read, gather, compute = measure("cpu", torch.float32, row_bytes=512, rounds=1)
    # which read is the faster depends on the CPU and on its neighbours
    assert read.gb_s > 0 and gather.gb_s > 0 and compute > 0
    assert read.name == "read of 256 MiB" and "512-byte" in gather.name


def test_float16_is_limited_by_the_products_that_our_kernels_make():
    assert multiplied_as("cpu", torch.float16) is torch.float32
    assert multiplied_as("cpu", torch.bfloat16) is torch.bfloat16
    assert multiplied_as("cuda", torch.float16) is torch.float16


def test_layers_stay_cold_and_keep_what_they_say():
    shape = layers.Shape("tiny", 2, 512, text=64, heads=4, kv_heads=2, head_dim=16)
    made = layers.Layers.make(shape, torch.float32, layers=3)
    assert len(made) == 3 and made.at(4)[1] is made.kv[1]
    assert made.visual.counts.tolist() == [512, 512]
    import visionpulse as vp

    _, selection = vp.decode(*made.at(0), made.visual, shape.config())
    assert selection.counts.tolist() == [shape.kept] * 2
    # long contexts get as many layers as push the first one out of the last cache
    published = layers.Shape("b1-1k", 1, 1024)
    each = published.cache_bytes(torch.bfloat16)
    held = len(layers.Layers.make(published, torch.bfloat16, layers=36, budget=0))
    assert held == 2 or (held - 1) * each >= 2 * layers.LAST_CACHE["cpu"]


def test_plots_say_what_they_need(monkeypatch, tmp_path):
    import builtins

    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError("no matplotlib here")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'visionpulse\[plots\]'"):
        plots.by_retention({"8k": {0.1: 0.5}}, tmp_path / "a.png", title="t")


def test_every_plot_draws(tmp_path):
    pytest.importorskip("matplotlib")
    points = [plots.Point("ours", "8k", 4e6, 1e6, 1e-3)]
    plots.roofline(points, cost.Roof(1e10, 1e12), tmp_path / "r.svg", title="r")
    series = {"8k": {0.05: 0.1, 0.5: 0.9}}
    plots.by_retention(series, tmp_path / "s.svg", title="s")
    plots.by_context({"ours": {1024: 1e-3, 5000: 2e-3}}, tmp_path / "c.svg", title="c")
    for name in "rsc":
        xml.etree.ElementTree.parse(tmp_path / f"{name}.svg")
    assert plots.short(4096) == "4k" and plots.short(5000) == "5000"


def test_the_published_decoders_are_those_of_the_papers_models():
    for name in cost.KNOWN:
        decoder = cost.decoder_of(name)
        assert (decoder.layers, decoder.heads, decoder.kv_heads) == (36, 32, 8)
