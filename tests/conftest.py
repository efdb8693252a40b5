"""Options and fixtures of the whole suite."""

import pytest
import torch

import visionpulse as vp
from visionpulse import ops
from visionpulse.backends import get, names
from visionpulse.testing import (
    assert_masses,
    assert_output,
    assert_scores,
    assert_valid_selection,
)
from visionpulse.testing.compare import Exact, assert_counts


def pytest_addoption(parser):
    parser.addoption("--backends", default="", help="test these backends only, by comma")
    parser.addoption(
        "--require-backends",
        default="",
        help="fail where one of these cannot run, so that a skip hides nothing",
    )


def _listed(config, option):
    return [name for name in config.getoption(option).split(",") if name]


def pytest_report_header():
    states = (f"{name}: {get(name).unavailable() or 'runs here'}" for name in names())
    return ["backends", *(f"  {state}" for state in states)]


def pytest_sessionstart(session):
    for name in _listed(session.config, "--require-backends"):
        reason = get(name).unavailable()
        if reason:
            pytest.exit(f"backend {name!r} must run here but cannot: {reason}", returncode=3)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        chosen = _listed(metafunc.config, "--backends") or names()
        marks = []
        for name in chosen:
            reason = get(name).unavailable()
            skip = [pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else []
            marks.append(pytest.param(name, id=name, marks=skip))
        metafunc.parametrize("backend", marks)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These machines are shared: a second thread waits for its neighbours more than it helps."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN, so that a slot nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device(backend):
    """Where the tensors of a backend live in these tests."""
    kinds = get(backend).auto_devices or ("cpu",)
    return "cpu" if "cpu" in kinds or not torch.cuda.is_available() else "cuda"


@pytest.fixture(scope="session")
def params_of():
    """The numbers that the ops make of a problem's config."""

    def give(problem, config=None):
        options = {"scale": None, "softcap": None, "window": None} | problem.case.options
        params = ops.numbers(problem.q, **options)
        config = config or problem.config
        return ops.budget(params, config, problem.visual, problem.case.rows, problem.q.device)[0]

    return give


@pytest.fixture(scope="session")
def check_decode(params_of):
    """Run decode once and hold everything it gives against the contract."""

    def check(problem, backend, config=None):
        config = config or problem.config
        q, kv, visual = problem.q, problem.kv, problem.visual
        params = params_of(problem, config)
        scores = torch.empty(kv.batch, kv.capacity, device=q.device)
        out, selection = vp.decode(
            q, kv, visual, config, scores=scores, backend=backend, **problem.case.options
        )
        exact = Exact(q, kv, visual, params)
        assert_masses(selection.mass, selection.mass_mean, exact)
        assert_scores(scores, exact)
        assert selection.indices.shape == (kv.batch, params.k_max)
        assert_counts(selection, exact.n_visual, params)
        assert_valid_selection(selection, scores, exact.candidate)
        assert_output(out, exact, selection if config.anchor_output == "pruned" else None)
        return out, selection, scores

    return check
