"""The runner of the GPU checks: it goes on after a failure, ends in time, and says what it left."""

import fcntl
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    return gpu_check


@pytest.fixture
def parts(gpu_check):
    import gpu_parts

    return gpu_parts


@pytest.fixture
def a_run(parts, tmp_path):
    return parts.Run(tmp_path, ["cuda", "triton"])


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


def test_a_machine_without_the_sanitizer_says_so(parts, check, a_run, monkeypatch):
    monkeypatch.setattr(parts.shutil, "which", lambda name: None)
    for command in parts.sanitize(a_run._replace(backends=["cuda"])):
        check.run("sanitize", command)
    assert summary(check).count("NOT RUN (compute-sanitizer is not on PATH") == 3
    assert check.failed == 3


def test_every_command_names_a_file_that_is_there(gpu_check, parts, a_run):
    for part in parts.PARTS.values():
        for command in part.commands(a_run):
            for word in command.words:
                if word.startswith(("tests/", "benchmarks/")):
                    assert (gpu_check.ROOT / word).is_file(), word


def test_what_matters_most_comes_first(parts):
    order = list(parts.PARTS)
    assert order[:5] == ["build", "smoke", "stages", "decode", "profile"]
    later = ("device", "suite", "models", "sanitize", "serve-flash")
    assert [order.index(name) for name in later] == sorted(order.index(name) for name in later)


def test_each_part_and_its_build_end_within_eight_minutes(parts, a_run):
    for name, part in parts.PARTS.items():
        seconds = sum(command.seconds for command in part.commands(a_run))
        assert seconds + (name != "build") * parts.BUILD <= parts.MOST == 480, name


def test_parts_are_named_alone_or_by_what_they_begin_with(parts):
    assert parts.named("suite,build,stages") == ["build", "stages", "suite"]
    assert len(parts.named("serve")) == 4 and parts.named("serve-flash") == ["serve-flash"]
    assert parts.named(",".join(parts.PARTS)) == list(parts.PARTS)
    with pytest.raises(ValueError, match="no part test; known: build, smoke"):
        parts.named("test,build")


SUITE = """
import os, pathlib, signal, time, pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "the \x1b[31mreason"
def test_left_out(): pytest.skip("not here")
@pytest.fixture
def broken(): raise RuntimeError("no memory")
def test_without_its_fixture(broken): pass
def test_hangs():
    while "test_hangs" not in pathlib.Path(os.environ["SUITE_LOG"]).read_text(): time.sleep(0.01)
    os.killpg(0, signal.SIGKILL)
def test_never_begun(): pass
"""


def test_a_suite_that_is_killed_leaves_the_fate_of_each_test(parts, check, tmp_path):
    (tmp_path / "test_some.py").write_text(SUITE)
    alone = ("--rootdir", str(tmp_path), "-c", "/dev/null", "-p", "no:cacheprovider")
    words = [sys.executable, "-m", "pytest", *alone, "-n", "1", str(tmp_path)]
    lines = {"SUITE_LOG": str(check.results / "suite.jsonl")}
    check.run("suite", parts.Command(words, 60, lines, suite="suite-cuda"))
    assert "FAILED (-9)" in summary(check)
    assert "hung: test_some.py::test_hangs" in summary(check)
    (suite,) = ElementTree.parse(check.results / "junit.xml").getroot()
    assert suite.attrib == {
        "name": "suite-cuda", "tests": "5", "failures": "2", "errors": "1", "skipped": "1"
    }  # fmt: skip
    found = {one.get("name"): [(kind.tag, kind.text) for kind in one] for one in suite}
    assert found["test_good"] == [] and found["test_left_out"][0][0] == "skipped"
    assert "the ?[31mreason" in found["test_bad"][0][1]
    assert "no memory" in found["test_without_its_fixture"][0][1]
    assert found["test_hangs"] == [("error", "it had begun when the suite was ended")]
    assert suite[0].get("classname") == "test_some"


@pytest.fixture
def whole(gpu_check, parts, tmp_path, monkeypatch):
    """A whole run whose parts only note their turn, in a folder that has no build yet."""
    log, root = [], tmp_path / "root"
    (root / "visionpulse").mkdir(parents=True)
    monkeypatch.setattr(gpu_check, "ROOT", root)
    monkeypatch.setattr(gpu_check, "STAMP", root / "build" / "gpu-check.txt")
    monkeypatch.setattr(gpu_check, "SOURCES", ("kernel.cu",))
    monkeypatch.setattr(gpu_check, "HAS_CUDA", "")
    (root / "kernel.cu").write_text("one")

    def ended(words, environment, seconds, out):
        log.append((*words, *environment.values()))
        if words[0] == "build":
            (root / "visionpulse" / "_C.so").write_text(str(len(log)))
        return "ok"

    monkeypatch.setattr(gpu_check, "finished", ended)
    for name in parts.PARTS:
        noted = lambda run, name=name: [parts.Command([name], 1)]  # noqa: E731
        monkeypatch.setitem(parts.PARTS, name, parts.Part(noted, ""))
    monkeypatch.setattr(gpu_check, "build", lambda run: [parts.Command(["build"], 1)])

    def run(*options, results="results"):
        log.clear()
        words = ["gpu_check", "--results", str(tmp_path / results), *options]
        monkeypatch.setattr(sys, "argv", words)
        gpu_check.main()
        return [entry[0] for entry in log], log

    return run, root, tmp_path


def test_a_part_builds_first_what_is_not_there(whole, parts):
    run, root, _ = whole
    assert run("--parts", "suite")[0] == ["build", "suite"]
    assert run("--parts", "stages,suite")[0] == ["stages", "suite"]
    (root / "kernel.cu").write_text("two")
    assert run("--parts", "suite")[0] == ["build", "suite"]
    assert run()[0] == list(parts.PARTS)


def test_a_build_is_carried_to_another_machine_of_the_same_sources(whole, monkeypatch):
    run, root, tmp_path = whole
    run("--parts", "smoke", results="first")
    built = tmp_path / "first" / "built"
    assert sorted(path.name for path in built.iterdir()) == ["_C.so", "gpu-check.txt"]
    (root / "build" / "gpu-check.txt").unlink()
    log = run("--parts", "suite", "--built", str(built), results="second")[1]
    assert log == [("build", str(built / "_C.so")), ("suite",)]
    (root / "kernel.cu").write_text("two")  # not of these sources
    log = run("--parts", "suite", "--built", str(built), results="third")[1]
    assert log == [("build",), ("suite",)]


def test_what_had_no_time_is_named_with_the_command_for_the_rest(whole):
    run, _, tmp_path = whole
    assert run("--minutes", "0", "--parts", "stages,suite", "--commit", "abc")[0] == []
    said = (tmp_path / "results" / "summary.txt").read_text()
    assert "the rest: python benchmarks/gpu_check.py --parts build,stages,suite --built" in said
    assert "--commit abc" in said


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


def test_a_profile_prints_what_the_latency_model_predicts_of_each_launch(gpu_check):
    import profile_launches

    dense, follower = map(profile_launches.predicted, profile_launches.LAUNCHES)
    # microseconds: above the bytes of each at 4.3 TB/s, below twice that and ten of latency
    assert 15 < dense < 42 and 14 < follower < 40


def test_rows_without_a_commit_are_given_one(gpu_check, tmp_path):
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps({"machine": {"commit": c}}) + "\n" for c in ("", "abc")))
    gpu_check.stamp(path, "def")
    commits = [json.loads(line)["machine"]["commit"] for line in path.read_text().splitlines()]
    assert commits == ["def", "abc"]
