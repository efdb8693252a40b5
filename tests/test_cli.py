"""`visionpulse plot` and `visionpulse calibrate`, as a person calls them."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import visionpulse as vp
from visionpulse import cli
from visionpulse.backends import states
from visionpulse.cli import calibrate as command_calibrate
from visionpulse.cli import info
from visionpulse.cli import plot as command_plot
from visionpulse.models import Trace
from visionpulse.trace.page import png


@pytest.fixture
def saved(tmp_path):
    n = 3
    trace = Trace(
        conversation=np.zeros(n, np.int64), step=np.arange(n), layer=np.full(n, 2),
        row=np.zeros(n, np.int64), token=np.arange(n), n_visual=np.full(n, 12),
        mass=np.full(n, 0.5), mass_mean=np.full(n, 0.2), ends=np.array([1, 3, 4]),
        positions=np.array([2, 5, 9, 13]), spans={(0, 0): [(2, 14)]}, about={"model": "m"},
    )  # fmt: skip
    path = tmp_path / "trace.npz"
    trace.save(path)
    return path


def data_of(page):
    return json.loads(re.search(r"const DATA = (\{.*?\});\n", page.read_text()).group(1))


def test_plot_writes_a_page_beside_the_trace(saved, capsys):
    assert command_plot.main([str(saved)]) == 0
    page = saved.with_suffix(".html")
    assert capsys.readouterr().out == f"{page}\n"
    (sequence,) = data_of(page)["sequences"]
    assert sequence["layers"]["2"]["ends"] == [1, 3, 4]
    assert (sequence["pictures"][0]["rows"], sequence["pictures"][0]["columns"]) == (3, 4)


def test_plot_takes_pictures_with_their_grids(saved, tmp_path):
    pytest.importorskip("PIL")
    paths = []
    for name, size in (("a", (40, 60)), ("b", (30, 30))):
        paths.append(tmp_path / f"{name}.png")
        paths[-1].write_bytes(png(np.full((*size, 3), 90, np.uint8)))
    out = tmp_path / "out.html"
    assert command_plot.main([
        str(saved), "--out", str(out), "--picture", str(paths[0]), "--grid", "2x3",
        "--picture", str(paths[1]), "--grid", "3x2",
    ]) == 0  # fmt: skip
    pictures = data_of(out)["sequences"][0]["pictures"]
    assert [(p["rows"], p["columns"], p["name"], p["size"]) for p in pictures] == [
        (2, 3, "a.png", [60, 40]), (3, 2, "b.png", [30, 30])
    ]  # fmt: skip


def test_plot_draws_for_print(saved, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.pdf"
    assert command_plot.main([str(saved), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"%PDF")


def test_plot_says_what_is_wrong(saved, capsys, tmp_path):
    for options, message in (
        (["--grid", "5x5"], "12 visual tokens, the pictures given have 5 x 5"),
        (["--grid", "five"], "a grid is ROWSxCOLUMNS"),
        (["--grid", "2x3", "--grid", "2x3", "--picture", "a.png"], "1 pictures and 2 grids"),
    ):
        assert command_plot.main([str(saved), *options]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_plot.main([str(tmp_path / "none.npz")])
    assert "record=True" in capsys.readouterr().err


def test_calibrate_writes_a_config_that_patch_takes(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "visionpulse.json"
    options = ["tiny", "--count", "1", "--tokens", "6", "--out", str(out)]
    assert command_calibrate.main(options) == 0
    said = capsys.readouterr()
    assert "suggested: anchor" in said.out and "95 %" in said.out
    assert said.out.endswith(f'in {out}: use it as\nvp.patch(model, "{out}") or --preset {out}\n')
    assert max(map(len, said.out.replace(str(out), "visionpulse.json").splitlines())) <= 80
    assert "settings" not in said.err  # no bar of ours where nobody watches
    from visionpulse.data import tiny

    with vp.patch(tiny.load(), str(out)) as session:
        assert session.anchors == (vp.load_config(out).anchor,)


def test_calibrate_needs_inputs_like_those_of_the_user(capsys):
    with pytest.raises(SystemExit):
        command_calibrate.main(["some/model"])
    assert "--data is needed" in capsys.readouterr().err


def test_lines_of_data_become_prompts(tmp_path):
    class Processor:
        def apply_chat_template(self, talk, **options):
            return {"talk": talk, "options": options}

    items = [{"image": "a.png", "prompt": "what?"}, {"image": ["b.png", "c.png"], "prompt": "why?"}]
    made = list(command_calibrate.prompts(Processor(), items, tmp_path))
    content = made[1]["talk"][0]["content"]
    assert [part.get("image") for part in content] == [
        str(tmp_path / "b.png"), str(tmp_path / "c.png"), None
    ]  # fmt: skip
    assert content[-1]["text"] == "why?" and made[0]["options"]["add_generation_prompt"]
    with pytest.raises(ValueError, match="line 1 needs 'image' and 'prompt'"):
        list(command_calibrate.prompts(Processor(), [{"prompt": "x"}], tmp_path))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_an_example_the_exit_codes_and_80_columns(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "exit codes: 0 done, 1 it failed" in said
    assert f"example:\n  visionpulse {verb} " in said
    assert max(map(len, said.splitlines())) <= 80
    if "--preset" in said:
        words = " ".join(said.split())
        assert "--preset NAME|FILE" in words and "or a .json file of" in words


def closed(folder):
    """A path that no user can write below, root neither."""
    (folder / "file").write_text("")
    return folder / "file" / "out"


# name: (arguments, exit code, words of the one line on stderr)
ERRORS = {
    "no such script": (["run", "none.py"], 1, "no script 'none.py'; with -m"),
    "no such module": (["run", "-m", "none_such.run"], 1, "No module named 'none_such'"),
    "no such submodule": (["run", "-m", "json.none"], 1, "No module named json.none; without -m"),
    "package alone": (["run", "-m", "xml"], 1, "cannot be directly executed"),
    "log not writable": (["run", "--log", "CLOSED", "SCRIPT"], 1, "file"),
    "trace broken": (["plot", "SCRIPT"], 1, "no .npz file"),
    "page not writable": (["plot", "TRACE", "--out", "CLOSED"], 1, "cannot use"),
    "bench not writable": (["bench", "--out", "CLOSED"], 1, "cannot use"),
    "demo not writable": (["demo", "--out", "CLOSED"], 1, "cannot use"),
    "demo preset": (["demo", "--preset", "7pct"], 2, "no preset '7pct'"),
    "demo file": (["demo", "--preset", "none.json"], 2, "no file none.json"),
    **{
        f"{verb[0]} dense": ([*verb, "--preset", "dense"], 2, "dense prunes nothing")
        for verb in (["demo"], ["bench"], ["calibrate", "tiny"], ["acceptance", "--model", "tiny"])
    },
    "bench file": (["bench", "--preset", "none.json"], 2, "no file none.json"),
    "bench model": (["bench", "--model", "BROKEN"], 2, "is no JSON"),
    "calibrate preset": (["calibrate", "tiny", "--preset", "none.json"], 2, "no file none.json"),
    "calibrate not writable": (["calibrate", "tiny", "--out", "CLOSED"], 1, "cannot use"),
    "calibrate no weights": (["calibrate", "EMPTY", "--data", "DATA"], 1, "visionpulse calibrate:"),
}


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--pictures", "0"), ("demo", "--seed", "-1"), ("bench", "--batch", "0"),
        ("bench", "--text", "-4"), ("bench", "--threads", "two"),
        ("calibrate", "tiny", "--count", "0"), ("acceptance", "--model", "tiny", "--tokens", "1"),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_is_refused_by_its_option(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"argument {arguments[-2]}: wants a whole number" in said


def test_the_version_is_said(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"visionpulse {vp.__version__}\n"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_an_exit_code(name, tmp_path, saved, capsys, monkeypatch):
    if name.startswith(("calibrate no", "run")):
        pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, code, words = ERRORS[name]
    script, data = tmp_path / "script.py", tmp_path / "data.jsonl"
    script.write_text("raise SystemExit(9)")
    data.write_text('{"image": "a.png", "prompt": "what?"}\n')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    places = {
        "CLOSED": closed(tmp_path), "SCRIPT": script, "TRACE": saved, "DATA": data,
        "BROKEN": tmp_path / "broken.json", "EMPTY": tmp_path / "empty",
    }  # fmt: skip
    assert cli.main([str(places.get(a, a)) for a in arguments]) == code
    said = capsys.readouterr().err.strip()
    assert words in said and said.splitlines()[-1].startswith(f"visionpulse {arguments[0]}: ")
    assert "Traceback" not in said and len(said.splitlines()[-1]) < 600


def test_a_module_that_the_program_misses_keeps_its_traceback(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "needs.py").write_text("import none_such")
    (tmp_path / "asks.py").write_text("import runpy; runpy.run_module('none_such')")
    # one process for both, since its start takes seconds; not this one: importers remember folders
    (tmp_path / "both.py").write_text(
        "import traceback\nfrom visionpulse import cli\nfor name in ('needs', 'asks'):\n"
        "    try:\n        print(cli.main(['run', '-m', name]))\n"
        "    except ImportError:\n        print(traceback.format_exc(), end='\\0')\n"
    )
    command = [sys.executable, "both.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    needs, asks, rest = ended.stdout.split("\0")
    for said, name in ((needs, "needs.py"), (asks, "asks.py")):
        assert name in said and "none_such" in said.splitlines()[-1]
    assert rest == ""


def test_a_line_of_data_that_is_no_json_is_named():
    for line in ("{", "[" * 100_000, "3"):
        with pytest.raises(ValueError, match="line 4 of --data"):
            command_calibrate._item(4, line)


def test_ctrl_c_ends_without_a_traceback(capsys, monkeypatch):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", stop)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "visionpulse info: stopped\n"


def test_a_reader_that_leaves_early_hears_no_error():
    command = f"{sys.executable} -u -m visionpulse info | true"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ended.stderr == ""


def test_info_is_short_and_in_full_on_demand(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert cli.main(["info", "-v"]) == 0
    full = capsys.readouterr().out
    assert all(f"{name:<10} {state}" in full for name, state in states().items())
    assert info.short("built without CUDA; with nvcc on PATH run: x") == "built without CUDA"
    assert len(info.short("x" * 300)) == 66
