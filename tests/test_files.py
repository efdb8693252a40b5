"""Files: a stop halfway leaves the old one, and a broken one gets one line with the way out."""

import json
import stat
import threading

import numpy as np
import pytest

import visionpulse as vp
from visionpulse.budgets import Fixed, Random, TopK, TopP
from visionpulse.config import config_data
from visionpulse.files import append_line, replacing, write_text
from visionpulse.models import Trace


def trace(n=3):
    return Trace(
        conversation=np.zeros(n, np.int64), step=np.arange(n), layer=np.full(n, 2),
        row=np.zeros(n, np.int64), token=np.arange(n), n_visual=np.full(n, 12),
        mass=np.full(n, 0.5), mass_mean=np.full(n, 0.2), ends=np.array([1, 3, 4]),
        positions=np.array([2, 5, 9, 13]), spans={(0, 0): [(2, 14)]}, about={"model": "m"},
    )  # fmt: skip


def test_a_stop_halfway_leaves_the_old_file_and_no_other(tmp_path):
    path = write_text(tmp_path / "a.json", "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_new_file_keeps_the_link_and_the_mode_of_the_old_one(tmp_path):
    path = write_text(tmp_path / "a.json", "old")
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    write_text(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("write", ["save", "to_html"])
def test_a_folder_that_is_not_there_is_named_beside_the_file(write, tmp_path):
    path = tmp_path / "none" / "trace.npz"
    with pytest.raises(FileNotFoundError, match=r"no folder .*none to write to") as raised:
        getattr(trace(), write)(path)
    assert raised.value.filename == str(path)


def test_a_folder_that_takes_no_file_is_named_by_the_file_asked_for():
    with pytest.raises(OSError) as raised, replacing("/proc/a.json") as temporary:
        temporary.write_text("new")
    assert raised.value.filename == "/proc/a.json"


@pytest.mark.parametrize("write", ["save", "to_html", "plot"])
def test_a_trace_that_cannot_be_written_leaves_the_old_file(write, tmp_path, monkeypatch):
    if write == "plot":
        pytest.importorskip("matplotlib")
    path = tmp_path / "trace.png"
    path.write_text("old")

    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        getattr(trace(), write)(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def changed(**arrays):
    def write(path):
        trace().save(path)
        with np.load(path) as file:
            held = {name: file[name] for name in file.files} | arrays
        with open(path, "wb") as file:
            np.savez(file, **{name: array for name, array in held.items() if array is not None})

    return write


def cut(path):
    trace().save(path)
    path.write_bytes(path.read_bytes()[:-200])


def spoilt(path):
    trace().save(path)
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)


TRACES = {
    "missing": (lambda path: None, "no file"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "no .npz file"),
    "text": (lambda path: path.write_text("hello"), "no .npz file"),
    "pickle": (lambda path: path.write_bytes(b"\x80\x04N."), "no .npz file"),
    "cut": (cut, "no whole trace"),
    "spoilt": (spoilt, "no whole trace"),
    "foreign": (lambda path: np.savez(path, weights=np.zeros(3)), "it has no about, conversation"),
    "objects": (changed(mass=np.array([{}, {}, {}])), "no whole trace"),
    "about no JSON": (changed(about=np.asarray("{")), "no whole trace"),
    "about too deep": (changed(about=np.asarray("[" * 100_000)), "no whole trace"),
    "spans": (changed(spans=np.zeros(3, np.int64)), "integers [runs, 4]"),
    "row without spans": (changed(row=np.full(3, 9)), "has no spans"),
    "columns": (changed(token=np.zeros(2, np.int64)), "token has 2 entries, step 3"),
    "ends": (changed(ends=np.array([1, 3, 9])), "ends do not cut"),
    "mass of words": (changed(mass=np.array(["a", "b", "c"])), "mass must be one row of numbers"),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_broken_trace_gets_one_line(name, tmp_path):
    write, words = TRACES[name]
    path = tmp_path / "trace.npz"
    write(path)
    with pytest.raises(ValueError) as caught:
        Trace.load(path)
    said = str(caught.value)
    assert words in said and str(path) in said and "\n" not in said and len(said) < 600
    assert "pickle" not in said.replace(str(path), "")


def test_a_trace_comes_back_whole(tmp_path):
    trace().save(tmp_path / "trace")
    again = Trace.load(tmp_path / "trace")
    assert [row.kept.tolist() for row in again] == [row.kept.tolist() for row in trace()]
    assert again.spans == trace().spans and again.about == trace().about


CONFIGS = {
    "empty": ("", "is no JSON"),
    "no text": (b"\xff\xfe\x00", "is no JSON"),
    "cut": ('{"config": {"tau": 0.', "is no JSON"),
    "too deep": ("[" * 100_000, "nested too deep"),
    "deep inside": ('{"config": {"ratio": ' + "[" * 500 + "]" * 500 + "}}", "ratio must be a pair"),
    "digits": ('{"config": {"tau": ' + "9" * 5000 + "}}", "is no JSON"),
    "huge": ('{"config": {"tau": ' + "9" * 4000 + "}}", "tau must be finite"),
    "infinite": ('{"config": {"tau": 1e999}}', "tau must be finite"),
    "huge ratio": ('{"config": {"ratio": [0, ' + "9" * 4000 + "]}}", "r_min <= r_max"),
    "nan": ('{"config": {"ratio": [NaN, 1]}}', "r_min <= r_max"),
    "no names": ('{"config": [1]}', "holds no config"),
    "a policy's name": ('{"config": {"budget": "top_k"}}', "unknown budget 'top_k'"),
    "a policy's number": ('{"config": {"budget": "top_k:many"}}', "write top_k:64"),
    "a policy's range": ('{"config": {"budget": "fixed:3"}}', "ratio in 0..1"),
    "a policy unknown": ('{"config": {"budget": "best:3"}}', "fixed, random, top_k, top_p"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_broken_config_file_gets_one_line(name, tmp_path):
    text, words = CONFIGS[name]
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        vp.load_config(path)
    said = str(caught.value)
    assert words in said and str(path) in said and "\n" not in said and len(said) < 700


@pytest.mark.parametrize(
    "text, policy",
    [
        ("dynamic", "dynamic"),
        ("fixed:0.05", Fixed(0.05)),
        ("top_k:64", TopK(64)),
        ("top_p:0.9", TopP(0.9)),
        ("random:7", Random(7)),
    ],
)
def test_a_budget_is_named_in_json(text, policy, tmp_path):
    config = vp.PulseConfig(budget=text, ratio=(0.01, 0.2), anchor=(2, 5))
    assert config.budget == policy
    data = config_data(config)
    assert data["budget"] == text and data["tau"] == 0.4 and data["anchor"] == (2, 5)
    path = write_text(tmp_path / "config.json", json.dumps({"config": data}))
    assert vp.load_config(path) == config


def test_a_line_is_added_whole_behind_one_that_was_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    append_line(log, '{"a": 1}')
    with log.open("a") as file:
        file.write('{"b": ')
    append_line(log, '{"c": 3}')
    assert log.read_text().splitlines() == ['{"a": 1}', '{"b": ', '{"c": 3}']


def test_several_writers_lose_no_line(tmp_path):
    log, line = tmp_path / "log.jsonl", "x" * 100_000

    def write():
        for _ in range(20):
            append_line(log, line)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert log.read_text().splitlines() == [line] * 80
