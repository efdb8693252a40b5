"""`visionpulse demo`: what it prints is what happened, and where it cannot run it says why."""

import builtins
import json
import re

import numpy as np
import pytest

from visionpulse.cli import demo
from visionpulse.data import tiny, trail


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The demo's output and page on a small number of pictures."""
    pytest.importorskip("transformers")
    import contextlib
    import io

    out, printed = tmp_path_factory.mktemp("demo") / "page.html", io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        # a tenth of a second for what takes ten
        patched.setattr(demo, "EACH", 64)
        assert demo.main(["--pictures", "4", "--seed", "3", "--out", str(out)]) == 0
    return printed.getvalue(), out


def test_both_answers_stand_side_by_side(shown):
    text, _ = shown
    picture, question = trail.test_set(3, 4, tiny.SIDE, "crowded")[0]
    model = tiny.load()
    given = tiny.inputs_of([(picture, question)])
    dense = model.generate(**given, do_sample=False, max_new_tokens=64)
    dense = tiny.until_end(dense[0, given["input_ids"].shape[1] :].tolist())
    table = text.split("mass\n")[1].split("\ndense: ")[0].splitlines()
    assert [line[2:].split()[0] for line in table[: len(dense)]] == trail.words(dense)
    verdict = "right" if dense == question.answer else "wrong"
    assert f"\ndense: {verdict}\n" in text
    marked = [line.startswith("!") for line in table]
    said = [line[2:].split()[:2] for line in table]
    answer = trail.words(question.answer)
    assert marked[: len(answer)] == [
        pair != [word, word] for pair, word in zip(said, answer, strict=False)
    ]


def test_numbers_are_measured(shown):
    text, out = shown
    assert max(map(len, text.replace(str(out), "page.html").splitlines())) <= 80
    dense, sparse, ratio = map(
        float,
        re.search(r"dense ([\d.]+) ms, VisionPulse ([\d.]+) ms, ratio ([\d.]+)", text).groups(),
    )
    assert dense > 0 and abs(dense / sparse - ratio) < 0.02 * ratio
    mean, low, high = map(
        float, re.search(r"kept: ([\d.]+) % on average, ([\d.]+) % to ([\d.]+) %", text).groups()
    )
    assert 1.0 <= low <= mean <= high <= 5.0
    counts = re.search(r"4 pictures, .*: dense (\d), VisionPulse (\d)", text).groups()
    assert all(0 <= int(count) <= 4 for count in counts)


def test_the_page_holds_the_picture_and_the_steps(shown):
    text, out = shown
    page = out.read_text()
    data = json.loads(re.search(r"const DATA = (\{.*?\});\n", page).group(1))
    (sequence,) = data["sequences"]
    assert sequence["tokens"] == 400 and sequence["pictures"][0]["png"]
    (part,) = sequence["layers"].values()
    counts = np.diff([0, *part["ends"]]).tolist()
    table = text.split("mass\n")[1].split("\ndense: ")[0].splitlines()
    listed = [re.search(r"\s(\d+)\s+(\d\.\d\d)(?: #*)?$", line) for line in table[1:]]
    assert [int(found.group(1)) for found in listed if found] == counts
    assert [found.group(2) for found in listed if found] == [f"{m:.2f}" for m in part["mass"]]
    assert part["text"][0] == "HAS"


def test_the_page_says_in_words_what_it_shows(shown):
    """The question, both answers as they were printed, and the times of a long context."""
    text, out = shown
    story = json.loads(re.search(r"const DATA = (\{.*?\});\n", out.read_text()).group(1))["story"]
    assert re.fullmatch(r"Start at the \w+ glyph [A-P]\. .*", story["question"])
    table = text.split("mass\n")[1].split("\ndense: ")[0].splitlines()
    for column, name in enumerate(("dense", "VisionPulse")):
        said = [line[2:].split()[column] for line in table[: len(story["answers"][name])]]
        assert said == story["answers"][name]
    assert "512 visual tokens" in story["times"]["title"]
    for name, ms in story["times"]["rows"]:
        assert ms > 0 and re.search(rf"{re.escape(name)} +{ms:,.1f} ms", text)


def test_attention_of_a_long_context_is_the_sum_of_its_layers(monkeypatch):
    from visionpulse.bench import long_context
    from visionpulse.bench.timing import Times

    def timed(variants, rounds):
        for run in variants.values():
            run(1)
        return {name: Times((float(1 + i),)) for i, name in enumerate(variants)}

    monkeypatch.setattr(long_context, "interleaved", timed)
    import visionpulse as vp

    found = long_context.step_seconds(vp.PRESETS["5pct"], 512)
    # 1 to 5 s a layer: torch's two forms, dense, anchor, follower; 17 dense, 1 anchor, 18 followers
    assert list(found.values()) == [36, 72, 108, 17 * 3 + 4 + 18 * 5]


def test_without_transformers_it_names_the_way_out(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert demo.main([]) == 1
    assert "pip install 'visionpulse[transformers]'" in capsys.readouterr().err


def test_without_weights_it_says_where_they_come_from(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr(tiny, "load", lambda load=tiny.load: load(tmp_path))
    assert demo.main([]) == 1
    assert "benchmarks/accuracy/train.py" in capsys.readouterr().err
