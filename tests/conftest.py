"""Options and fixtures of the whole suite, and which tests have a place on this machine."""

from collections import Counter
from functools import cache

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
    compare,
)
from visionpulse.testing.compare import Exact, assert_counts

GPU_BACKENDS = ("cuda", "triton")
# {why tests are left out: how many}
NOT_HERE = pytest.StashKey[Counter]()


def pytest_addoption(parser):
    parser.addoption("--backends", default="", help="test these backends only, by comma")
    parser.addoption(
        "--require-backends",
        default="",
        help="fail where one of these cannot run, so that a missing one hides nothing",
    )
    parser.addoption("--examples", type=int, default=50, help="random problems that a test draws")
    parser.addoption(
        "--worst-ratios",
        action="store_true",
        help="print the largest error over its bound of every backend and dtype",
    )


def pytest_configure(config):
    config.stash[NOT_HERE] = Counter()
    if config.getoption("--worst-ratios"):
        config.pluginmanager.register(WorstRatios())


class WorstRatios:
    """Notes how near each test comes to its bounds; the notes travel with its report."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend is None:
            return (yield)

        def note(what, dtype, ratio):
            name = str(dtype).removeprefix("torch.")
            item.user_properties.append(("worst ratio", (backend, what, name, ratio)))

        compare.watches.append(note)
        try:
            return (yield)
        finally:
            compare.watches.remove(note)

    def pytest_terminal_summary(self, terminalreporter):
        worst = {}
        for outcome in ("passed", "failed"):
            for report in terminalreporter.getreports(outcome):
                for name, found in report.user_properties:
                    if name == "worst ratio" and report.when == "call":
                        *key, ratio = found
                        was = worst.get(tuple(key), (-1.0, ""))
                        worst[tuple(key)] = max(was, (ratio, report.nodeid))
        terminalreporter.section("largest error over its bound")
        for (backend, what, dtype), (ratio, test) in sorted(worst.items()):
            line = f"{backend:10} {what:10} {dtype:9} {ratio:6.3f}  {test}"
            terminalreporter.write_line(line)


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
    """`backend` is every one in turn, `on` every one of a GPU."""
    for argument, every in (("backend", names()), ("on", GPU_BACKENDS)):
        if argument in metafunc.fixturenames:
            if metafunc.definition.get_closest_marker("bits"):
                # its products are torch's, which picks an algorithm by batch and CPU
                every = [name for name in every if name != "reference"]
            if metafunc.definition.get_closest_marker("float8"):
                every = [name for name in every if get(name).reads_float8]
            each = [pytest.param(name, id=name, marks=pytest.mark.backend(name)) for name in every]
            metafunc.parametrize(argument, each)


def _why_not_here(item, chosen, missing):
    """What keeps a test from running on this machine; "" for one that nobody asked for."""
    for mark in item.iter_markers("backend"):
        (name,) = mark.args
        if chosen and name not in chosen:
            return ""
        if why := missing(name):
            reason, *_ = why.split(";")
            return f"{name} ({reason})"
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "tests of a device (no GPU)"
    return None


@pytest.hookimpl(trylast=True)  # behind -k and -m: what they leave out is nobody's loss
def pytest_collection_modifyitems(config, items):
    chosen, kept, left_out = _listed(config, "--backends"), [], []
    missing = cache(lambda name: get(name).unavailable())  # asked of those that tests need
    for item in items:
        why = _why_not_here(item, chosen, missing)
        (kept if why is None else left_out).append(item)
        if why:
            config.stash[NOT_HERE][why] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["not_here"] = dict(session.config.stash[NOT_HERE])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Every process of pytest-xdist has collected all tests: the counts of one are those of all."""
    node.config.stash[NOT_HERE] = Counter(getattr(node, "workeroutput", {}).get("not_here", {}))


def pytest_terminal_summary(terminalreporter, config):
    for why, count in sorted(config.stash[NOT_HERE].items()):
        terminalreporter.write_line(f"not here: {why}: {count} tests")


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
def check_output():
    """Compare an output with the contract, as exact as its backend declares to be."""

    def check(out, exact, selection, backend):
        rounds_weights = get(backend).rounds_weights(out.dtype)
        assert_output(out, exact, selection, rounds_weights=rounds_weights)

    return check


@pytest.fixture(scope="session")
def check_decode(params_of, check_output):
    """Run decode once and hold everything it gives against the contract."""

    def check(problem, backend, config=None):
        config = config or problem.config
        q, kv, visual = problem.q, problem.kv, problem.visual
        params = params_of(problem, config)
        scores = torch.empty(*q.shape[:-2], kv.capacity, device=q.device)
        out, selection = vp.decode(
            q, kv, visual, config, q_counts=problem.q_counts, scores=scores, backend=backend,
            **problem.case.options,
        )  # fmt: skip
        assert out.shape == q.shape
        assert selection.indices.shape == (q.shape[:-2].numel(), params.k_max)
        outs, ranked = (t.view(-1, *t.shape[q.dim() - 2 :]) for t in (out, scores))
        for rows, one in problem.one_by_one():
            exact, chosen = Exact.of(one, params), selection.rows(rows)
            assert_masses(chosen.mass, chosen.mass_mean, exact)
            assert_scores(ranked[rows], exact)
            assert_counts(chosen, exact.n_visual, params)
            assert_valid_selection(chosen, ranked[rows], exact.candidate)
            kept = chosen if config.anchor_output == "pruned" else None
            check_output(outs[rows], exact, kept, backend)
        return out, selection, scores

    return check
