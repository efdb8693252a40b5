"""Every Python block of the README runs, and its definition of the stages is the truth."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch

import visionpulse as vp
from visionpulse.testing.draw import Draws

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def blocks(heading):
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def tiny_model():
    pytest.importorskip("transformers")
    from visionpulse.data import tiny, trail

    return tiny.load(), tiny.inputs_of(trail.test_set(5, 1, 12, "crowded"))


def test_the_first_lines_run_on_the_tiny_model():
    (code,) = re.findall(r"```python\n(.*?)```", README.split("\n## ")[0], re.S)
    model, inputs = tiny_model()
    names = {"model": model, "inputs": inputs}
    exec(compile(code, "README.md", "exec"), names)
    assert names["session"].stats.steps and names["out"].shape[0] == 1
    names["session"].unpatch()


def test_the_first_picture_shows_the_committed_rows():
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    import front

    with image.open(front.PICTURE) as picture:
        drawn = json.loads(picture.text["Description"])
    assert drawn == json.loads(json.dumps(front.numbers())), "run python benchmarks/front.py"


def test_the_quickstart_runs():
    (code,) = blocks("Use it on tensors")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert "->" in printed.getvalue()


def test_the_model_example_runs_on_the_tiny_model():
    (code,) = blocks("Use it on a model")
    model, inputs = tiny_model()
    names = {"vp": vp, "model": model, "inputs": inputs}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    assert "retention" in printed.getvalue()
    assert names["out"].shape[0] == names["dense"].shape[0] == 1


def test_the_three_stages_are_the_decode_op():
    (code,) = blocks("The three stages, in PyTorch")
    draws, heads, size, dim = Draws(0), 4, 90, 16
    q, k, v = draws.normal(heads, dim), draws.normal(size, dim), draws.normal(size, dim)
    visual = torch.zeros(size).bool()
    visual[5:70] = True
    config = vp.PulseConfig(tau=0.4, ratio=(0.05, 0.3))
    names = {
        "torch": torch,
        "floor": math.floor,
        "z": dim**-0.5 * q @ k.T,
        "v": v,
        "V": visual.nonzero().flatten(),
        "text": (~visual).nonzero().flatten(),
        "tau": config.tau,
        "r_min": config.ratio[0],
        "r_max": config.ratio[1],
    }
    exec(compile(code, "README.md", "exec"), names)
    kv = vp.KVCache(k[None, None], v[None, None])
    out, selection = vp.decode(
        q[None], kv, vp.VisualTokens.from_mask(visual[None]), config, backend="reference"
    )
    assert names["kept"].tolist() == selection.indices[0, : selection.counts[0]].tolist()
    torch.testing.assert_close(names["out"], out[0])
    torch.testing.assert_close(names["M"], selection.mass[0])
