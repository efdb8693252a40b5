"""The properties that judge a backend are themselves judged: right passes, wrong fails."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import visionpulse as vp
from visionpulse.backends import get
from visionpulse.bench import timing
from visionpulse.call import Params
from visionpulse.testing import (
    CASES,
    assert_masses,
    assert_output,
    assert_valid_selection,
)
from visionpulse.testing.compare import Exact, assert_counts
from visionpulse.workspace import Workspace

ROOT = Path(__file__).parents[1]
SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.5, 0.2, torch.nan, 0.0]])
CANDIDATE = torch.tensor([[True, True, True, True, True, True, True, False]])
NOTHING = torch.zeros(1)


def selection(indices, count):
    row = torch.tensor([indices], dtype=torch.int32)
    return vp.Selection(row, torch.tensor([count], dtype=torch.int32), NOTHING, NOTHING)


@pytest.mark.parametrize(
    "indices, count",
    [
        ([1, 2, 3, -1], 3),
        ([1, -1], 1),
        ([0, 1, 2, 3, 4, 5, 6], 7),
        ([-1], 0),
        ([0, 1, 2, 3, 4, 5], 6),
    ],
)
def test_a_right_selection_passes(indices, count):
    assert_valid_selection(selection(indices, count), SCORES, CANDIDATE)


@pytest.mark.parametrize(
    "indices, count, why",
    [
        ([1, 2, 4, -1], 3, "ties"),
        ([2, 1, 3], 3, "ascending"),
        ([1, 1, 2], 3, "ascending"),
        ([0, 1, 2], 3, "below a dropped one"),
        ([1, 2, 7], 3, "only visible visual"),
        ([1, 2, 0], 2, "padding"),
        ([1, 2, 8], 3, "positions"),
        ([1, 2, 6], 3, "NaN kept"),
        ([1, 2], 3, "outside"),
    ],
)
def test_a_wrong_selection_fails(indices, count, why):
    with pytest.raises(AssertionError, match=why):
        assert_valid_selection(selection(indices, count), SCORES, CANDIDATE)


def exact_of(name, dtype=torch.bfloat16):
    problem = CASES[name].build(dtype)
    params = Params(problem.q.shape[2] ** -0.5, tau=0.4)
    return problem, Exact(problem.q, problem.kv, problem.visual, params)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_an_output_a_little_off_fails(dtype):
    """In one place, the largest, by a few ulps more than its bound."""
    problem, exact = exact_of("grouped", dtype)
    out = vp.attend(problem.q, problem.kv, backend="reference")
    assert_output(out, exact, None)
    place = out.abs().argmax()
    out.view(-1)[place] *= 1 + (64 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="error"):
        assert_output(out, exact, None)


def test_a_nan_in_the_output_fails():
    problem, exact = exact_of("grouped")
    out = vp.attend(problem.q, problem.kv, backend="reference")
    out[0, 0, 0] = torch.nan
    with pytest.raises(AssertionError, match="NaN in other places"):
        assert_output(out, exact, None)


def test_a_mass_a_little_off_fails():
    _, exact = exact_of("grouped")
    mass, mean = exact.mass.float(), exact.mass_mean.float()
    assert_masses(mass, mean, exact)
    with pytest.raises(AssertionError, match="mass"):
        assert_masses(mass * 1.001, mean, exact)
    with pytest.raises(AssertionError, match="mass_mean"):
        assert_masses(mass, mean * 0.999, exact)


def test_a_count_off_by_one_fails():
    counts = torch.tensor([10], dtype=torch.int32)
    mass = torch.tensor([0.1])
    params = Params(1.0, r_min=0.0, r_max=1.0)
    right = vp.Selection(counts, counts, mass, mass)
    assert_counts(right, torch.tensor([100], dtype=torch.int32), params)
    with pytest.raises(AssertionError, match="asks for"):
        assert_counts(
            vp.Selection(counts, counts - 1, mass, mass),
            torch.tensor([100], dtype=torch.int32),
            params,
        )


def test_hidden_slots_hold_nan():
    problem = CASES["left-padding"].build()
    hidden = ~CASES["left-padding"].visible()
    assert hidden.any() and problem.kv.k.transpose(1, 2)[hidden].isnan().all()


def test_fresh_memory_is_poisoned():
    assert torch.empty(1000).isnan().all()


def test_timing_interleaves_and_tells_the_turn():
    calls = []
    variants = {name: lambda turn, name=name: calls.append((name, turn)) for name in "abc"}
    times = timing.interleaved(variants, rounds=5, warmup=2)
    assert [turn for _, turn in calls] == list(range(21))
    rounds = [calls[i : i + 3] for i in range(0, 21, 3)]
    assert all({name for name, _ in played} == set("abc") for played in rounds)
    assert len({tuple(name for name, _ in played) for played in rounds}) > 1, "one fixed order"
    assert all(len(t.seconds) == 5 for t in times.values())


def test_a_timed_call_finds_its_tensors_cold_and_its_code_warm(monkeypatch):
    layers, shared, seen = [torch.zeros(1), torch.zeros(1)], torch.zeros(1), []
    monkeypatch.setattr(timing, "evict", lambda tensors: seen.extend(map(id, tensors)))
    timing.interleaved(
        {"a": lambda turn: seen.append(turn)}, rounds=1, warmup=0,
        cold=lambda name, turn: [layers[turn % 2], shared],
    )  # fmt: skip
    assert seen == [id(layers[0]), 1, id(shared), 0]


def test_what_a_step_calls_once_finds_its_scratch_cold(monkeypatch):
    workspace, seen = Workspace(), []
    monkeypatch.setattr(timing, "evict", lambda tensors: seen.extend(map(id, tensors)))
    scratch = partial(workspace.take, "logits", 8, torch.float32, torch.device("cpu"))
    timing.interleaved(
        {"a": timing.OncePerStep(lambda turn: seen.append((turn, scratch())[0]), workspace)},
        rounds=1, warmup=0, cold=lambda name, turn: [],
    )  # fmt: skip
    assert seen == [1, id(scratch()), 0]


def test_quantiles_are_times_that_were_taken():
    times = timing.Times(tuple(float(i) for i in range(1, 12)))
    assert (times.best, times.p20, times.p50, times.p80) == (1.0, 3.0, 6.0, 9.0)
    assert timing.Times((2.0,)).p80 == 2.0


def test_a_backend_that_cannot_run_here_is_one_line():
    """Also where two processes have counted."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-k", "dirty_workspace"]
    done = subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("not here: ")]
    missing = [name for name in ("cuda", "triton") if get(name).unavailable()]
    assert [line.split()[2] for line in lines] == missing
    assert all(line.endswith("): 1 tests") for line in lines) and "skipped" not in done.stdout
