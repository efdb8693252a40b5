"""The CUDA kernels on a simulated GPU: the contract, and planted bugs that must not pass."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, LifoQueue

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cusim"))
from planted import BUGS, CRAMPED, HALF_GPU, MOST, OLD_CODE, ONE_SM, SCARCE

from build import HERE, ROOT, build

COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler"),
]

LANDINGS = ({"landing": "late"}, {"landing": "early"})
# Threads and blocks in an order of their own, and a dtype, per seed.
RUNS = {1: "bfloat16", 2: "float16", 3: "float32"}
# K and V of 8 bits beside q of bfloat16, or of what is named
FLOAT8 = {4: "float8", 5: "float8-float16", 6: "float8-float32"}
SMALL = {
    "bfloat16": ("bf16, BFloat16, 64, 8", "bf16, BFloat16, 64, 32", "bf16, BFloat16, 64, 64"),
    "float32": ("fp32, float, 64, 4", "fp32, float, 64, 32"),
    "float8": ("fp8, Float8Beside16, 64, 8", "fp8, Float8Beside16, 64, 32"),
}
GPUS = ({"gpu": None}, {"gpu": HALF_GPU})
SELECTS = (*GPUS, {"gpu": SCARCE}, {"gpu": CRAMPED})  # each selects in a way of its own


def environment(module, seed, landing, gpu):
    """What stand_in.py reads."""
    return {
        "CUSIM_MODULE": str(module),
        "CUSIM_SEED": str(seed),
        "CUSIM_LANDING": landing,
        "CUSIM_GPU": gpu or "",
    }


def surroundings(asan=False):
    """The environment of a process, with ASan below Python."""
    found = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    if asan:
        library = subprocess.check_output([COMPILER, "-print-file-name=libasan.so"], text=True)
        found["LD_PRELOAD"] = library.strip()
        found["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    return found


IDLE = {False: LifoQueue(), True: LifoQueue()}  # servers without a job, without and with ASan


class Server:
    """A process that runs problems, see problems.py."""

    def __init__(self, asan):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, HERE / "problems.py", "--serve"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=surroundings(asan), **pipes)

    def answer(self, *job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module", autouse=True)
def servers():
    """End the servers with the last test here."""
    yield
    for idle in IDLE.values():
        while not idle.empty():
            idle.get().close()


def run(module, what, dtype, *, seed=1, landing="late", asan=False, gpu=None):
    """Problems of one kind; their exit code and what they said last."""
    idle = IDLE[asan]
    try:
        server = idle.get_nowait()
    except Empty:
        server = Server(asan)
    try:
        return server.answer(environment(module, seed, landing, gpu), what, dtype)
    finally:
        idle.put(server)


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(scope="module")
def watched():
    return build(asan=True)


def hold(module, what, dtype, ways, **options):
    """Run problems in several ways, two at a time; all must hold."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, module, what, dtype, **options, **way) for way in ways]
        for way, (code, text) in zip(ways, (of.result() for of in runs), strict=True):
            assert code == 0, f"{way}: {text}"


@pytest.mark.parametrize("seed, dtype", RUNS.items())
def test_shared_cases_in_any_order(plain, seed, dtype):
    hold(plain, "cases", dtype, LANDINGS, seed=seed)


@pytest.mark.parametrize("seed, dtype", RUNS.items())
def test_shared_cases_touch_no_memory_but_theirs(watched, seed, dtype):
    hold(watched, "cases", dtype, LANDINGS, seed=seed, asan=True)


@pytest.mark.parametrize("what", ("cases", "kernels"))
def test_a_cache_of_8_bits_is_the_contract_in_any_order(plain, what):
    """Beside q of each dtype."""
    ways = [landing | gpu for landing, gpu in zip(LANDINGS, GPUS, strict=True)]
    for seed, dtype in FLOAT8.items():
        hold(plain, what, dtype, ways, seed=seed)


@pytest.mark.parametrize("seed, dtype", FLOAT8.items())
def test_a_cache_of_8_bits_touches_no_memory_but_its_own(watched, seed, dtype):
    hold(watched, "cases", dtype, LANDINGS[seed % 2 :][:1], seed=seed, asan=True)


def test_the_suite_of_all_backends_passes(plain):
    """What it holds beside the cases: bits that depend on no neighbour, page size or capacity."""
    beside = "not decode_is_the_contract and not it_is_said"
    shared = ("tests/test_backends.py", "tests/test_buffers.py", "tests/test_queries.py")
    suite = (*shared, "--backends", "cuda", "--require-backends", "cuda")
    quiet = ("-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "stand_in")
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 600}
    options["env"] = surroundings() | environment(plain, 4, "late", None)

    def half(of):
        command = [sys.executable, "-m", "pytest", *quiet, *suite, "-k", f"{beside} and {of}"]
        done = subprocess.run(command, **options)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(half, ("float32", "not float32")))


@pytest.mark.parametrize("dtype", RUNS.values())
def test_every_kernel_is_the_contract_on_any_gpu(plain, dtype):
    hold(plain, "kernels", dtype, GPUS, seed=5)


@pytest.mark.parametrize("seed, dtype", (RUNS | FLOAT8).items())
def test_several_queries_of_a_row_share_each_key(plain, seed, dtype):
    hold(plain, "queries", dtype, GPUS, seed=seed)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "float8"))
def test_several_queries_touch_no_memory_but_theirs(watched, dtype):
    hold(watched, "queries", dtype, ({"gpu": None},), asan=True)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_groups_of_splits_are_merged_in_one_order(plain, dtype):
    hold(plain, "groups", dtype, [way | {"gpu": MOST} for way in LANDINGS])


def test_groups_of_splits_touch_no_memory_but_theirs(watched):
    hold(watched, "groups", "bfloat16", ({"gpu": MOST},), asan=True)


@pytest.mark.parametrize("seed", RUNS)
def test_a_choice_among_thousands_is_exact(plain, seed):
    hold(plain, "choices", "float32", SELECTS, seed=seed)


def test_a_choice_among_thousands_touches_no_memory_but_its_own(watched):
    ways = [{"seed": seed} | gpu for seed, gpu in enumerate(SELECTS, start=1)]
    hold(watched, "choices", "float32", ways, asan=True)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "float8"))
def test_garbage_is_skipped(watched, dtype):
    hold(watched, "garbage", dtype, GPUS, asan=True)


@pytest.mark.parametrize("dtype", SMALL)
def test_kernels_built_for_80_alone_are_right_on_newer_chips(dtype):
    """They have no clusters, no early launch and no copy engine, which the chip would have."""
    older = build(kernels=SMALL[dtype], arch=OLD_CODE)
    for what in ("probe", "choices"):
        hold(older, what, dtype, ({"gpu": ONE_SM}, {"gpu": HALF_GPU}))


def test_the_copy_engine_changes_no_bit(plain):
    hold(plain, "bulk", "float32", LANDINGS)


@pytest.mark.parametrize("dtype", (*RUNS.values(), *FLOAT8.values()))
def test_each_key_is_read_once_in_few_launches(plain, dtype):
    hold(plain, "traffic", dtype, GPUS)


@pytest.mark.parametrize(
    "asan, dtype", sorted({(bug.asan, bug.dtype) for bug in BUGS.values() if not bug.arch})
)
def test_the_probes_pass_without_a_bug(plain, watched, asan, dtype):
    """All that is run with one; those of older code have a test of their own."""
    used = {(bug.what, bug.gpu, bug.landing) for bug in BUGS.values()
            if (bug.asan, bug.dtype) == (asan, dtype) and not bug.arch}  # fmt: skip
    for what in {what for what, *_ in used}:
        ways = [{"gpu": gpu, "landing": landing} for of, gpu, landing in used if of == what]
        hold(watched if asan else plain, what, dtype, ways, asan=asan)


def plant(bug):
    module = build(bug.asan, bug.edits, SMALL[bug.dtype], bug.arch)
    return run(module, bug.what, bug.dtype, landing=bug.landing, asan=bug.asan, gpu=bug.gpu)


@pytest.fixture(scope="module")
def planted(plain, watched, request):
    """{bug: what becomes of it} of the bugs that are tested now, two at a time."""
    name = test_a_planted_bug_is_caught.__name__
    items = [item for item in request.session.items if getattr(item, "originalname", "") == name]
    with ThreadPoolExecutor(2) as pool:
        bugs = [item.callspec.params["bug"] for item in items]
        yield {id(bug): pool.submit(plant, bug) for bug in bugs}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_a_planted_bug_is_caught(planted, bug):
    code, text = planted[id(bug)].result()
    assert code != 0, "the bug went through"
    assert bug.says in text, text
    if bug.says and not bug.asan:
        assert "vp_" in text, f"the error does not name the entry point: {text}"
