"""The runner of the GPU checks: it goes on after a failure, ends in time, and says what it left."""

import json
import sys
import time
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
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    check.run("tests", gpu_check.Command([sys.executable, "-c", code], 1))
    assert time.monotonic() - began < 3 and "TOO LONG (over 1 s)" in summary(check)
    time.sleep(3)
    assert not mark.exists() and check.failed == 1


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
    for command in [*commands, *gpu_check.sanitize(backends)]:
        for word in command.words:
            if word.startswith(("tests/", "benchmarks/")):
                assert (gpu_check.ROOT / word).is_file(), word


def test_rows_without_a_commit_are_given_one(gpu_check, tmp_path):
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps({"machine": {"commit": c}}) + "\n" for c in ("", "abc")))
    gpu_check.stamp(path, "def")
    commits = [json.loads(line)["machine"]["commit"] for line in path.read_text().splitlines()]
    assert commits == ["def", "abc"]
