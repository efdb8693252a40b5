"""What only the CPU backend promises: instruction sets, threads, forks, and bits."""

import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

import visionpulse as vp
from visionpulse.backends import cpu, get
from visionpulse.call import Call, Params
from visionpulse.testing.draw import Draws

REASON = get("cpu").unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")
ROOT = Path(__file__).parents[1]
OTHER_SETS = [] if REASON else cpu.instruction_sets()[1:]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKEND = cpu.CpuBackend()


def problem(rows=2, size=700, heads=8, kv_heads=2, dim=64, dtype=torch.float32, seed=0):
    draws = Draws(seed)

    def random(*shape):
        return draws.normal(*shape).to(dtype)

    kv = vp.KVCache(random(rows, kv_heads, size, dim), random(rows, kv_heads, size, dim))
    visual = vp.VisualTokens.from_spans([[(10, size // 2), (size // 2 + 9, size - 20)]] * rows)
    return random(rows, heads, dim), kv, visual


def decoded(q, kv, visual, config=None, **more):
    """Everything that a decode gives, as one list of tensors."""
    config = config or vp.PulseConfig(ratio=(0.1, 0.4))
    scores = torch.empty(kv.batch, kv.capacity)
    out, kept = vp.decode(q, kv, visual, config, scores=scores, backend="cpu", **more)
    follower = vp.attend(q, kv, visual, kept, backend="cpu", **more)
    dense = vp.attend(q, kv, backend="cpu", **more)
    return [out, scores, kept.indices, kept.counts, kept.mass, kept.mass_mean, follower, dense]


def same_bits(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def shared_tests(name, *options):
    """Run the tests of all backends on one instruction set."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--backends", "cpu", *options]
    done = subprocess.run(
        [*command, "tests/test_backends.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "VISIONPULSE_CPU_ISA": name},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("name", OTHER_SETS)
def test_every_instruction_set_passes_some_shared_tests(name):
    shared_tests(name, "-k", "(ragged or paged-hnd or group7) and (stages or dense_decode)")


@pytest.mark.deep
@pytest.mark.parametrize("name", OTHER_SETS)
def test_every_instruction_set_passes_the_shared_tests(name):
    shared_tests(name)


def test_the_environment_forces_an_instruction_set():
    code = "from visionpulse.backends import cpu; print(cpu.instruction_set())"
    done = python(code, VISIONPULSE_CPU_ISA="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


def test_an_unknown_instruction_set_is_an_error_that_lists_those_there_are():
    code = "import visionpulse as vp; vp.backends()"
    done = python(code, VISIONPULSE_CPU_ISA="avx1024")
    assert done.returncode != 0
    for word in ("VISIONPULSE_CPU_ISA", "avx1024", "baseline"):
        assert word in done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("anchor_output", ("pruned", "dense"))
def test_the_same_bits_on_any_number_of_threads(threads, dtype, anchor_output):
    q, kv, visual = problem(rows=3, size=2500, dtype=dtype)
    kv = vp.KVCache(kv.k, kv.v, torch.tensor([2500, 1, 1300], dtype=torch.int32))
    config = vp.PulseConfig(ratio=(0.1, 0.4), anchor_output=anchor_output)
    threads(1)
    alone = decoded(q, kv, visual, config)
    for count in (2, 3, 64):
        threads(count)
        assert same_bits(alone, decoded(q, kv, visual, config))


def test_a_row_keeps_its_bits_whatever_surrounds_it():
    q, kv, visual = problem(rows=3, size=900)
    lengths = torch.tensor([900, 333, 640], dtype=torch.int32)
    config = vp.PulseConfig(ratio=(0.1, 0.4))
    together = decoded(q, vp.KVCache(kv.k, kv.v, lengths), visual, config)
    for b in range(3):
        n = int(lengths[b])
        # the row alone, in a cache without room to spare
        alone = vp.KVCache(kv.k[b : b + 1, :, :n], kv.v[b : b + 1, :, :n])
        spans = visual.spans[b].clamp(max=n).tolist()
        own = vp.VisualTokens.from_spans([[(s, e) for s, e in spans if s < e]])
        out, kept = vp.decode(q[b : b + 1], alone, own, config, backend="cpu")
        assert torch.equal(out[0], together[0][b])
        count = int(kept.counts[0])
        assert count == together[3][b]
        assert torch.equal(kept.indices[0, :count], together[2][b, :count])
        assert kept.mass[0] == together[4][b]


@pytest.mark.parametrize("page", (1, 7, 16))
def test_pages_give_the_bits_of_a_contiguous_cache(page):
    q, kv, visual = problem(rows=1, size=700, dtype=torch.bfloat16)
    pages = -(-700 // page)
    padded = [torch.nn.functional.pad(t, (0, 0, 0, pages * page - 700)) for t in (kv.k, kv.v)]
    order = Draws(1).permutation(pages)

    def paged(t):  # [1, G, N, D] to [P, page, G, D], shuffled
        slots = t[0].unflatten(1, (pages, page)).permute(1, 2, 0, 3)
        return torch.empty_like(slots, memory_format=torch.contiguous_format).index_copy_(
            0, order, slots.contiguous()
        )

    lengths = torch.tensor([700], dtype=torch.int32)
    cache = vp.PagedKVCache(*map(paged, padded), order.to(torch.int32)[None], lengths)
    contiguous, from_pages = decoded(q, kv, visual), decoded(q, cache, visual)
    from_pages[1] = from_pages[1][:, :700]
    assert same_bits(contiguous, from_pages)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ("prob", "logit", "prob_tau"))
def test_equal_keys_get_equal_score_bits_wherever_they_lie(dtype, score):
    q, kv, _ = problem(rows=1, size=1100, dtype=dtype)
    places = torch.tensor([3, 64, 65, 511, 512, 1023, 1099])
    k = kv.k.clone()
    k[:, :, places] = k[:, :, 3:4]
    visual = vp.VisualTokens.from_spans([[(0, 1100)]])
    config = vp.PulseConfig(score=score)
    scores = vp.score(q, vp.KVCache(k, kv.v), visual, config, backend="cpu")[0]
    assert len(scores[0, places].unique()) == 1


def test_unaligned_rows_are_read_right():
    for dtype in DTYPES:
        q, kv, visual = problem(rows=1, size=300, dim=40, dtype=dtype)
        aligned = decoded(q, kv, visual)

        def shifted(t):
            flat = torch.empty(t.numel() + 1, dtype=t.dtype)
            return flat[1:].view(t.shape).copy_(t)

        moved = decoded(shifted(q), vp.KVCache(shifted(kv.k), shifted(kv.v)), visual)
        assert same_bits(aligned, moved)


def test_two_python_threads_work_at_once(threads):
    threads(2)
    q, kv, visual = problem(size=1500)
    expected, wrong = decoded(q, kv, visual), []

    def work():
        for _ in range(20):
            if not same_bits(expected, decoded(q, kv, visual)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORKED = """
import os, time, torch, visionpulse as vp
from visionpulse.testing.draw import Draws
torch.set_num_threads(4)
draws = Draws(0)
q, k = draws.normal(1, 8, 64), draws.normal(1, 2, 4000, 64)
kv = vp.KVCache(k, k)
first = vp.attend(q, kv, backend="cpu")
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(first, vp.attend(q, kv, backend="cpu")) else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


def test_a_forked_child_computes_and_the_interpreter_ends():
    done = python(FORKED)
    assert done.stdout.strip() == "done" and done.returncode == 0, done.stderr


def test_refusals_say_what_is_served():
    q, kv, visual = problem(dtype=torch.float64)
    with pytest.raises(vp.BackendUnavailableError, match="float32, bfloat16 and float16"):
        vp.decode(q, kv, visual, backend="cpu")


def test_scratch_memory_serves_calls_of_any_size():
    workspace = vp.Workspace()
    for size in (80, 2000, 90, 3000):
        q, kv, visual = problem(size=size)
        assert same_bits(decoded(q, kv, visual), decoded(q, kv, visual, workspace=workspace))


def given(**changes):
    """What the engine's `attend` takes, by name and in its order."""
    q, kv, visual = problem()
    _, kept = vp.decode(q, kv, visual, backend="cpu")
    return {
        "q": q, "out": torch.zeros_like(q), "q_counts": None,
        "k": kv.k, "v": kv.v, "starts": None, "lengths": None, "k_scale": None, "v_scale": None,
        "table": None, "heads_first": True, "spans": visual.spans, "offsets": visual.offsets,
        "indices": kept.indices, "counts": kept.counts, "params": vp.ops.numbers(q),
        "scratch": torch.empty(1 << 22, dtype=torch.uint8), "threads": 1,
    } | changes  # fmt: skip


def test_scratch_memory_is_that_of_the_workspace_and_ends_with_it():
    q, kv, _ = problem()
    call = Call(q, kv, Params(0.125))
    backend, mine, other = cpu.CpuBackend(), vp.Workspace(), vp.Workspace()

    def used(workspace):
        before = backend.attend(call._replace(workspace=workspace))
        buffers = [data for (name, *_), data in workspace._buffers.items() if name == "cpu"]
        assert torch.equal(before, expected) and len(buffers) == 1
        return weakref.ref(buffers[0])

    expected = backend.attend(call)
    first, second = used(mine), used(other)
    assert first() is not second() and used(mine) is first
    mine.clear()
    assert first() is None, "the backend keeps memory that its workspace let go"
    assert used(mine)() is not None
    del other
    assert second() is None, "the backend keeps memory of a workspace that is gone"


def test_the_engine_takes_what_lies_on_the_cpu():
    right = given()
    assert cpu._entries().attend(*right.values()) == 0
    q, kv = right["q"], vp.KVCache(right["k"], right["v"])
    assert torch.equal(right["out"], vp.attend(q, kv, problem()[2], vp.decode(*problem())[1]))


@pytest.mark.parametrize(
    ("name", "value", "error", "what"),
    [
        ("q", None, ValueError, "expected a tensor, got NoneType"),
        ("k", [[1.0]], ValueError, "expected a tensor, got list"),
        ("lengths", 7, ValueError, "expected a tensor, got int"),
        ("v", torch.empty(2, 2, 700, 64, device="meta"), Exception, "meta"),
        ("k", torch.zeros(2, 700, 64), ValueError, "of 4 axes, got 3"),
        ("q", torch.zeros(8, 64), ValueError, "3 or 4 axes"),
        ("q", torch.zeros(2, 8, 64, dtype=torch.float64), ValueError, "dtype"),
        ("k", torch.zeros(2, 2, 700, 64, dtype=torch.int32), ValueError, "dtype"),
        ("q", torch.zeros(2, 7, 64), ValueError, "shape"),
        ("params", (1.0, 2.0), ValueError, "12 numbers"),
        ("threads", "two", TypeError, "integer"),
    ],
    ids=str,
)
def test_the_engine_refuses_what_it_cannot_read(name, value, error, what):
    wrong = given(**{name: value})
    with pytest.raises(error, match=what):
        cpu._entries().attend(*wrong.values())
    assert not wrong["out"].any()


def test_the_engine_refuses_a_number_of_arguments_that_is_not_its_own():
    arguments = list(given().values())
    for wrong, what in ((arguments[:-1], "too few"), ([*arguments, 1], "too many")):
        with pytest.raises(ValueError, match=f"{what} arguments"):
            cpu._entries().attend(*wrong)
    assert not arguments[1].any()


def test_tensors_of_all_kinds_are_read():
    q, kv, visual = problem()
    expected = decoded(q, kv, visual)
    learned = vp.KVCache(torch.nn.Parameter(kv.k), kv.v.clone().requires_grad_())
    with torch.no_grad():
        assert same_bits(decoded(torch.nn.Parameter(q), learned, visual), expected)
    with torch.inference_mode():
        assert same_bits(decoded(*problem()), expected)


def test_the_output_of_a_strided_query_is_contiguous():
    q, kv, visual = problem()
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    out, kept = vp.decode(strided, kv, visual, backend="cpu")
    follower = vp.attend(strided, kv, visual, kept, backend="cpu")
    assert out.is_contiguous() and follower.is_contiguous()
    assert torch.equal(out, vp.decode(q, kv, visual, backend="cpu")[0])
    assert torch.equal(follower, vp.attend(q, kv, visual, kept, backend="cpu"))


PLACED = """
import os, time, torch, visionpulse as vp
from pathlib import Path
from visionpulse.testing.draw import Draws

def cores_of_pool():
    found = []
    for thread in Path("/proc/self/task").iterdir():
        if (thread / "comm").read_text().strip() == "visionpulse":
            found.append(sorted(os.sched_getaffinity(int(thread.name))))
    return sorted(found)

def settle(wanted):
    for _ in range(1000):
        if cores_of_pool() == wanted:
            return
        time.sleep(0.01)
        call()
    raise AssertionError((wanted, cores_of_pool()))

all_cores = sorted(os.sched_getaffinity(0))
first, last = all_cores[0], all_cores[-1]
torch.set_num_threads(3)
os.sched_setaffinity(0, {first})  # as a worker of an engine binds its main thread
k = Draws(0).normal(1, 2, 9000, 64)
call = lambda: vp.attend(k[:, :, 0], vp.KVCache(k, k), backend="cpu")
before = call()
settle([[first]] * 2)  # a new thread takes its name when it first runs
for cores, pin, wanted in (
    (all_cores, False, [all_cores] * 2),
    ([last], True, [[last]] * 2),
    (None, False, [[first]] * 2),
):
    vp.cpu.set_affinity(cores, pin=pin)
    assert torch.equal(before, call())
    settle(wanted)  # a thread moves when it next wakes
assert os.sched_getaffinity(0) == {first}
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds threads")
def test_the_pool_runs_on_the_cores_that_it_is_given_and_the_caller_stays():
    done = python(PLACED)
    assert done.stdout.strip() == "done", done.stderr


def test_cores_that_cannot_be_had_are_refused_by_number():
    with pytest.raises(ValueError, match="at least one core"):
        vp.cpu.set_affinity([])
    if hasattr(os, "sched_setaffinity"):
        with pytest.raises(ValueError, match=r"may not run on core\(s\) 9999"):
            vp.cpu.set_affinity([0, 9999])


def test_nodes_are_read_and_threads_placed_on_them_by_turns(tmp_path):
    for node, listed in ((0, "0-1,4\n"), (2, "2-3\n")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(listed)
    nodes = vp.cpu.nodes_of([0, 1, 2, 3, 4, 7], tmp_path)
    assert nodes == [0, 0, 2, 2, 0, 0]
    cores = [0, 1, 2, 3, 4]
    spread = vp.cpu.places(cores, nodes[:5], pin=False, caller=None)
    assert spread == [(0, [0, 1, 4]), (1, [2, 3]), (0, [0, 1, 4]), (1, [2, 3]), (0, [0, 1, 4])]
    pinned = vp.cpu.places(cores, nodes[:5], pin=True, caller=0)
    assert pinned == [(0, [1]), (1, [2]), (0, [4]), (1, [3]), (0, [0])]
