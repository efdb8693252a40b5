"""`visionpulse plot` and `visionpulse calibrate`, as a person calls them."""

import json
import re

import numpy as np
import pytest

import visionpulse as vp
from visionpulse.cli import calibrate as command_calibrate
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
    options = ["tiny", "--count", "1", "--tokens", "24", "--out", str(out)]
    assert command_calibrate.main(options) == 0
    said = capsys.readouterr()
    assert "suggested: anchor" in said.out and "95 %" in said.out
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
