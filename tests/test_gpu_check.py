"""The runner of the GPU checks: it goes on after a failure, ends in time, and says what it left."""

import fcntl
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    return gpu_check


@pytest.fixture
def check(gpu_check, tmp_path):
    return gpu_check.Check(tmp_path, 1)


def summary(check):
    return (check.results / "summary.txt").read_text()


def test_a_failure_is_logged_and_the_backends_run_alone(gpu_check, check):
    good, bad = (gpu_check.Command([sys.executable, "-c", code], 30) for code in ("", "1 / 0"))
    both = gpu_check.Command(bad.words, 30, alone=(good, bad))
    check.run("bench", both)
    check.run("bench", good)
    lines = [line.split()[1] for line in summary(check).splitlines()]
    assert lines == ["FAILED", "ok", "FAILED", "ok"] and check.failed == 2
    assert (check.results / "bench.log").read_text().count("ZeroDivisionError") == 2


def test_what_hangs_is_ended_with_all_that_it_started(gpu_check, check, tmp_path):
    lock, mark = tmp_path / "lock", tmp_path / "mark"
    lock.touch()
    child = (
        "import fcntl, time, pathlib\n"
        f"held = open({str(lock)!r}); fcntl.flock(held, fcntl.LOCK_EX)\n"
        f"time.sleep(60); pathlib.Path({str(mark)!r}).touch()"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    check.run("tests", gpu_check.Command([sys.executable, "-c", code], 3))
    assert "TOO LONG (over 3 s)" in summary(check) and check.failed == 1
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as soon as the child has ended
        assert not mark.exists()


def test_what_has_no_time_left_is_named(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path, 0)
    check.run("bench", gpu_check.Command([sys.executable, "-c", ""], 30))
    assert "NOT RUN (no time was left" in summary(check) and check.failed == 1


def test_a_machine_without_the_sanitizer_says_so(gpu_check, check, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    for command in gpu_check.sanitize(["cuda"]):
        check.run("sanitize", command)
    assert summary(check).count("NOT RUN (compute-sanitizer is not on PATH") == 3
    assert check.failed == 3


def test_every_command_names_a_file_that_is_there(gpu_check, tmp_path):
    backends = ["cuda", "triton"]
    commands = gpu_check.tests(backends) + gpu_check.bench(tmp_path / "rows", backends)
    for command in [*commands, *gpu_check.sanitize(backends), *gpu_check.serve()]:
        for word in command.words:
            if word.startswith(("tests/", "benchmarks/")):
                assert (gpu_check.ROOT / word).is_file(), word


def test_every_test_of_a_device_follows_the_backend_that_is_asked_for():
    """So that a run with `--backends` leaves none out."""
    path = Path(__file__).with_name("test_gpu.py")
    spec = importlib.util.spec_from_file_location("tests_of_a_device", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [one for name, one in vars(module).items() if name.startswith("test_")]
    assert len(tests) > 8
    for test in tests:
        marks = {mark.name for mark in getattr(test, "pytestmark", ())}
        assert "on" in inspect.signature(test).parameters or "backend" in marks, test.__name__


def test_rows_without_a_commit_are_given_one(gpu_check, tmp_path):
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps({"machine": {"commit": c}}) + "\n" for c in ("", "abc")))
    gpu_check.stamp(path, "def")
    commits = [json.loads(line)["machine"]["commit"] for line in path.read_text().splitlines()]
    assert commits == ["def", "abc"]
