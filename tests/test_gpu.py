"""What only a GPU can show of the CUDA and Triton backends: graphs, streams, and no look back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visionpulse as vp
from visionpulse.backends import cuda
from visionpulse.testing.cases import CASES, Case
from visionpulse.testing.draw import Draws
from visionpulse.visual import span_row

pytestmark = pytest.mark.gpu

SPANS = (((20, 700), (730, 1400)), ((5, 300),))
LONG = Case("", SPANS, size=1500, heads=32, kv_heads=8, head_dim=128, lengths=(1500, 611))
COUNTERS = ("counters", "arrived", "histogram")  # kept at zero by their kernels


class Step:
    """An anchor, a follower and a dense layer, on buffers of their own."""

    def __init__(self, problem, backend, workspace=None):
        self.problem, self.backend = problem, backend
        self.workspace = workspace or vp.Workspace()
        self.outs = [torch.empty_like(problem.q) for _ in range(3)]

    def __call__(self):
        q, kv, visual = self.problem.q, self.problem.kv, self.problem.visual
        shared = {"workspace": self.workspace, "backend": self.backend}
        _, self.selection = vp.decode(
            q, kv, visual, self.problem.config, out=self.outs[0], **shared
        )
        vp.attend(q, kv, visual, self.selection, out=self.outs[1], **shared)
        vp.attend(q, kv, out=self.outs[2], **shared)
        return self

    def results(self):
        chosen = self.selection
        tensors = (*self.outs, chosen.indices, chosen.counts, chosen.mass, chosen.mass_mean)
        return [tensor.clone() for tensor in tensors]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.nan_to_num(9), y.nan_to_num(9))


def test_a_step_reads_nothing_back(on):
    step = Step(LONG.build(torch.bfloat16, "cuda"), on)
    step()  # buffers grow, kernels load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(problem, backend, workspace=None):
    step = Step(problem, backend, workspace)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # the problem may still be on its way
    with torch.cuda.stream(side):
        Step(problem, backend, workspace)()  # kernels load; only a given workspace has memory then
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return step, graph


def test_a_graph_outlives_the_growth_of_its_workspace(on):
    """A longer problem makes the buffers anew; those of the graph stay, and its counters at 0."""
    small = CASES["grouped"].build(torch.bfloat16, "cuda")
    workspace = vp.Workspace()
    step, graph = captured(small, on, workspace)
    wanted = Step(small, on)().results()
    for seed in range(3):
        Step(LONG.build(torch.bfloat16, "cuda", seed=seed), on, workspace)()
        # what the allocator gives next must not be a buffer that the graph writes
        poison = [torch.full((1 << 14,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]
        graph.replay()
        assert_same(step.results(), wanted)
        assert all(bool((one == -1).all()) for one in poison)


@pytest.mark.parametrize("order", ((0, 1), (1, 0)))
def test_two_graphs_replay_in_any_order(on, order):
    """Captured with no memory made before: neither may count on the other's zeros."""
    problems = [CASES[name].build(torch.bfloat16, "cuda") for name in ("grouped", "long")]
    wanted = [Step(problem, on)().results() for problem in problems]
    shared = vp.Workspace()
    made = []
    for problem in problems:
        step, graph = Step(problem, on, shared), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        made.append((step, graph))
    for place in (*order, *order):
        step, graph = made[place]
        graph.replay()
        assert_same(step.results(), wanted[place])
    assert_same(Step(problems[0], on, shared)().results(), wanted[0])


def compiled(problem, backend):
    q, kv, visual, config = problem[1:]

    def step():
        out, kept = vp.decode(q, kv, visual, config, backend=backend)
        followed = vp.attend(q, kv, visual, kept, backend=backend)
        return out, followed, kept.indices, kept.counts, kept.mass

    return step, torch.compile(step, mode="reduce-overhead", fullgraph=True)


def test_a_compiled_step_keeps_nothing_in_the_memory_of_its_graph(on):
    """What transformers compiles with a static cache: warm-up, capture and replay in one pool."""
    step, fast = compiled(LONG.build(torch.bfloat16, "cuda"), on)
    wanted = [t.clone() for t in step()]
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same([t.clone() for t in fast()], wanted)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped


def test_a_replayed_graph_follows_lengths_that_changed(on):
    """And queries, hence masses."""
    problem = LONG.build(torch.bfloat16, "cuda")
    step, graph = captured(problem, on)
    q, masses = problem.q.clone(), set()
    for lengths, sharp in (((1500, 611), 1), ((900, 20), 0.1), ((64, 300), 3), ((1500, 1), 0.5)):
        problem.kv.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        problem.q.copy_(q * sharp)
        graph.replay()
        replayed = step.results()
        assert_same(replayed, Step(problem, on)().results())
        masses.add(float(step.selection.mass_mean[0]))
    assert len(masses) == 4


class Engine(Step):
    """A step over tables, lists and lengths that an engine owns and writes between replays."""

    def __init__(self, problem, backend, capacity=1400, max_runs=8):
        super().__init__(problem, backend)
        rows, config = problem.case.rows, problem.config
        shapes = ((rows, max_runs, 2), (rows, max_runs + 1), (rows,))
        self.tables = [torch.zeros(shape, dtype=torch.int32, device="cuda") for shape in shapes]
        visual = vp.VisualTokens.over(*self.tables, capacity)
        self.problem = problem._replace(visual=visual)
        self.kept = vp.Selection.empty(rows, config.k_max(capacity), "cuda")
        self.write([()] * rows)

    def write(self, runs):
        made = zip(*(span_row(row, self.tables[0].shape[1]) for row in runs), strict=True)
        for table, new in zip(self.tables, made, strict=True):
            table.copy_(torch.tensor(new, dtype=torch.int32))

    def __call__(self):
        q, kv, visual, config = self.problem[1:5]
        shared = {"workspace": self.workspace, "backend": self.backend}
        given = {"out": self.outs[0], "selection": self.kept}
        _, self.selection = vp.decode(q, kv, visual, config, **given, **shared)
        vp.attend(q, kv, visual, self.selection, out=self.outs[1], **shared)
        vp.attend(q, kv, out=self.outs[2], **shared)
        return self


def test_a_graph_follows_tables_that_an_engine_writes(on):
    """Captured with empty rows, as an engine does: a row of count 0 is dense in the same graph."""
    problem = LONG.build(torch.bfloat16, "cuda")
    engine, graph = Engine(problem, on), torch.cuda.CUDAGraph()
    engine()  # kernels load, scratch memory is made
    with torch.cuda.graph(graph):
        engine()
    for runs in (SPANS, (SPANS[1], ()), ((), SPANS[1]), SPANS):
        engine.write(runs)
        graph.replay()
        fresh = Engine(problem, on)
        fresh.write(runs)
        assert_same(engine.results(), fresh().results())
        counts = engine.kept.counts.tolist()
        assert [count > 0 for count in counts] == [bool(row) for row in runs]


def test_streams_do_not_disturb_each_other(on):
    problems = [LONG.build(torch.bfloat16, "cuda", seed=seed) for seed in range(4)]
    wanted = [Step(problem, on)().results() for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    steps = [Step(problem, on) for problem in problems]
    torch.cuda.synchronize()  # under these tests new memory is filled, on another stream
    for _ in range(50):
        for stream, step in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                step()
    torch.cuda.synchronize()
    for step, results in zip(steps, wanted, strict=True):
        assert_same(step.results(), results)


def test_a_neighbour_that_burns_changes_no_bit(on):
    """Blocks come in any order and few at a time, and clusters wait for room."""
    problem, side = LONG.build(torch.bfloat16, "cuda"), torch.cuda.Stream()
    step = Step(problem, on)
    wanted = step().results()
    heat = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(300):
            heat @ heat
    for _ in range(100):
        for now, then in zip(step().results(), wanted, strict=True):
            different += (now.nan_to_num(9) != then.nan_to_num(9)).sum()
    torch.cuda.current_stream().synchronize()
    assert not side.query(), "the neighbour ended before the steps did"
    assert int(different) == 0


def test_tensors_on_a_second_device_are_served_there(on):
    """While the first one is current, in turns with it, and on a stream of their own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    first, second = (LONG.build(torch.bfloat16, f"cuda:{n}") for n in range(2))
    steps = Step(first, on), Step(second, on)
    wanted = steps[0]().results()
    side = torch.cuda.Stream("cuda:1")
    side.wait_stream(torch.cuda.current_stream("cuda:1"))
    for _ in range(3):
        assert_same([t.to("cuda:0") for t in steps[1]().results()], wanted)
        assert_same(steps[0]().results(), wanted)
        with torch.cuda.stream(side):
            results = steps[1]().results()
        side.synchronize()
        assert_same([t.to("cuda:0") for t in results], wanted)
        assert torch.cuda.current_device() == 0


FIRST_USE = """
import torch
from test_gpu import LONG, Step, assert_same
step = Step(LONG.build(torch.bfloat16, "cuda"), "cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    step()
graph.replay()
replayed = step.results()
assert_same(replayed, Step(step.problem, "cuda")().results())
"""


@pytest.mark.backend("cuda")
def test_a_first_use_may_lie_in_a_capture():
    """No kernel is loaded before: a process of its own."""
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], cwd=here.parent, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths, "CUDA_MODULE_LOADING": "LAZY"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_back_to_back_steps_give_the_same_bits(on):
    """The counters re-arm, and a launch that starts early waits for what it reads."""
    step = Step(LONG.build(torch.bfloat16, "cuda"), on)
    wanted = step().results()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(20_000):
        for now, then in zip(step().results(), wanted, strict=True):
            different += (now.nan_to_num(9) != then.nan_to_num(9)).sum()
    assert int(different) == 0


def test_a_dirty_workspace_changes_nothing(on):
    problem = LONG.build(torch.bfloat16, "cuda")
    workspace = vp.Workspace()
    wanted = Step(problem, on, workspace)().results()
    for (name, *_), buffer in workspace._buffers.items():
        if not name.endswith(COUNTERS):
            buffer.view(torch.uint8).fill_(0xFF)
    assert_same(Step(problem, on, workspace)().results(), wanted)


@pytest.mark.parametrize("name", ("grouped", "group32", "d256", "long"))
def test_the_device_agrees_with_the_reference_selection(on, name):
    problem = CASES[name].build(torch.float32, "cuda")
    _, ours = vp.decode(problem.q, problem.kv, problem.visual, problem.config, backend=on)
    _, other = vp.decode(problem.q, problem.kv, problem.visual, problem.config, backend="reference")
    assert torch.equal(ours.counts, other.counts)


def test_offsets_beyond_32_bits(on):
    """The last row lies more than 2^31 elements into the cache."""
    n, rows = 1 << 20, 18
    memory = torch.zeros(rows, 1, n, 128, dtype=torch.bfloat16, device="cuda")
    k = memory
    k[-1, :, :300] = Draws(0).normal(1, 300, 128)
    lengths = torch.full((rows,), 300, dtype=torch.int32, device="cuda")
    q = Draws(1).normal(rows, 4, 128).to("cuda", torch.bfloat16)
    out = vp.attend(q, vp.KVCache(k, k, lengths), backend=on)
    last = vp.KVCache(k[-1:, :, :300].contiguous(), k[-1:, :, :300].contiguous())
    alone = vp.attend(q[-1:], last, backend=on)
    assert torch.equal(out[-1:], alone)


@pytest.mark.backend("cuda")
@pytest.mark.parametrize("name", ("grouped", "paged-hnd", "long"))
def test_both_ways_to_copy_a_tile_give_the_same_bits(monkeypatch, name):
    """Whole float32 tiles come by the copy engine or by threads; the engine's waits are its own."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no bulk copies")
    monkeypatch.setattr(cuda, "_copies", 0)
    problem, results = CASES[name].build(torch.float32, "cuda"), []
    for copies in ("async", "bulk"):
        cuda.use_copies(copies)
        step = Step(problem, "cuda")
        results.append([step().results() for _ in range(100)])
    for once in results[1]:
        assert_same(once, results[0][0])
