"""The CUDA kernels on a simulated GPU: the contract, and planted bugs that must not pass."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, LifoQueue

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cusim"))
from build import HERE, ROOT, Edit, build

COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler"),
]

LANDINGS = ({"landing": "late"}, {"landing": "early"})
# Threads and blocks in an order of their own, and a dtype, per seed.
RUNS = {1: "bfloat16", 2: "float16", 3: "float32"}
SMALL = {
    "bfloat16": ("bf16, BFloat16, 64, 8", "bf16, BFloat16, 64, 32"),
    "float32": ("fp32, float, 64, 4", "fp32, float, 64, 32"),
}
HALF_GPU = "80,5,101376"  # no clusters, and less shared memory
SCARCE = "80,1,30000"  # neither, and no room for the keys of a long row
CRAMPED = "90,1,20000"  # clusters, and no room for a block's part of it
OLD_CODE = "80"  # what sm_80, 86 and 89 run, and newer chips where the build has no other
ONE_SM = "90,1,232448"  # few splits: every warp meets more tiles than it has stages
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


def test_the_suite_of_all_backends_passes(plain):
    """What it holds beside the cases: bits that depend on no neighbour, page size or capacity."""
    beside = "not decode_is_the_contract"
    suite = ("tests/test_backends.py", "--backends", "cuda", "--require-backends", "cuda")
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


@pytest.mark.parametrize("seed", RUNS)
def test_a_choice_among_thousands_is_exact(plain, seed):
    hold(plain, "choices", "float32", SELECTS, seed=seed)


def test_a_choice_among_thousands_touches_no_memory_but_its_own(watched):
    ways = [{"seed": seed} | gpu for seed, gpu in enumerate(SELECTS, start=1)]
    hold(watched, "choices", "float32", ways, asan=True)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
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


@pytest.mark.parametrize("dtype", RUNS.values())
def test_each_key_is_read_once_in_few_launches(plain, dtype):
    hold(plain, "traffic", dtype, GPUS)


LAUNCH = "csrc/cuda/launch.cpp"
STREAM, MERGE = "kernels/cuda/stream.cuh", "kernels/cuda/merge.cuh"
PLAN, LAST, ROW = "csrc/cuda/plan.cpp", "kernels/cuda/last.cuh", "kernels/cuda/row.cuh"
DOTS, MMA = "kernels/cuda/dots.cuh", "kernels/cuda/mma.cuh"
SELECT, RADIX = "kernels/cuda/select.cu", "kernels/cuda/radix.cuh"
CANDIDATES = "kernels/cuda/candidates.cuh"


@dataclass(frozen=True)
class Bug:
    """A change that must be caught, how: landing of copies, ASan, and a word of what is said."""

    edits: tuple[Edit, ...]
    says: str  # "" where the results are wrong
    landing: str = "late"
    asan: bool = False
    what: str = "probe"
    dtype: str = "bfloat16"
    gpu: str = ONE_SM
    arch: str = ""


WAIT = "copy_wait_for(args.stages - 1);"
FIRST = "  __syncthreads();\n  if (threadIdx.x == 0) {"
LANDED = "if (kBulk && args.bulk) landing_wait(landings + stage, phase);\n      meet();"
BUGS = {
    "missing-barrier-after-wait": Bug(
        (Edit(STREAM, LANDED, LANDED.removesuffix("meet();")),), ""
    ),
    "short-wait": Bug(
        (Edit(STREAM, WAIT, "copy_wait_for(args.stages);"),), ""
    ),
    "team-that-does-not-meet": Bug(
        (Edit(STREAM, "team_barrier(1 + team, args.team * 32);", "__syncwarp();"),), ""
    ),
    "teams-that-meet-each-other": Bug(
        (Edit(STREAM, "team_barrier(1 + team, args.team", "team_barrier(1, args.team"),), ""
    ),
    "member-that-counts-no-group": Bug(
        (Edit(STREAM, "== member) load(refill);\n      copy_commit();",
              "== member) load(refill), copy_commit();"),),
        "",
    ),
    "missing-barrier-before-weights": Bug(
        (Edit(DOTS, "= p[i];\n    __syncwarp();", "= p[i];"),), "", dtype="float32"
    ),
    "missing-barrier-before-join": Bug(
        (Edit(STREAM, "  __syncthreads();\n  finish<", "  finish<"),), ""
    ),
    "divergent-barrier": Bug(
        (Edit(STREAM, "__syncthreads();  // the stages", "if (warp) __syncthreads();  // the"),),
        "different barriers",
    ),
    "left-before-barrier": Bug(
        (Edit(STREAM, "  let_next_start();\n", "  if (warps > 1 && warp == 0) return;\n"),),
        "barrier after a thread",
    ),
    "bad-shuffle-mask": Bug(
        (Edit(DOTS, "__shfl_xor_sync(kWarp, given", "__shfl_xor_sync(0xffffu, given"),),
        "not in its own mask",
        dtype="float32",
    ),
    "half-a-warp-skips": Bug(
        (Edit(STREAM, "if (!__any_sync(kWarp, grown)) return;",
              "if (lane() < 16 && !grown) return;\n    if (!__any_sync(kWarp, grown)) return;"),),
        "",
    ),
    "off-by-one-key": Bug(
        (Edit(STREAM, "index < share.end ? index", "index <= share.end ? index"),), ""
    ),
    "off-by-one-read": Bug(
        (Edit(STREAM, "d < args.head_dim ? q", "d <= args.head_dim ? q"),),
        "heap-buffer-overflow",
        asan=True,
    ),
    "off-by-one-write": Bug(
        (Edit(MERGE, "if (d >= args.head_dim) return;", "if (d > args.head_dim) return;"),),
        "heap-buffer-overflow",
        asan=True,
    ),
    "off-by-one-shared": Bug(
        (Edit(PLAN, "plan.shared_bytes = bytes;", "plan.shared_bytes = bytes - 64;"),),
        "",
        asan=True,
    ),
    "stage-refilled-early": Bug(
        (
            Edit(STREAM, "int32_t t = 1 - args.stages;", "int32_t t = -args.stages;"),
            Edit(STREAM, "next = t + args.stages - 1;", "next = t + args.stages;"),
            Edit(STREAM, WAIT, "copy_wait_for(args.stages);"),
        ),
        "",
        landing="early",
    ),
    "stage-refilled-before-all-are-done": Bug(
        (Edit(STREAM, "meet();  // everybody", "// everybody"),), "", landing="early"
    ),
    "bulk-not-awaited": Bug(
        (Edit(STREAM, LANDED, "meet();"),), "", dtype="float32"
    ),
    "bulk-phase-not-turned": Bug(
        (Edit(STREAM, "stage = 0, phase ^= 1", "stage = 0"),), "", dtype="float32"
    ),
    "bulk-expects-too-little": Bug(
        (Edit(STREAM, "whole ? k_bytes + args.v_bytes", "whole ? args.v_bytes"),),
        "",
        dtype="float32",
    ),
    "bulk-not-fenced": Bug(
        (Edit(STREAM, "fence_copy_engine();  // behind", "// behind"),),
        "without a fence",
        dtype="float32",
    ),
    "bulk-of-rows-apart": Bug(
        (Edit(STREAM, "apart && lane() < Tile::kKeys", "apart && lane() < 0"),),
        "",
        dtype="float32",
    ),
    "counter-not-rearmed": Bug(
        (Edit(LAST, "atomicInc(counter, blocks - 1)", "atomicInc(counter, blocks + 6)"),), ""
    ),
    "last-but-one-takes-over": Bug(
        (Edit(LAST, "blocks - 1) == blocks - 1", "blocks - 1) == blocks - 2"),),
        "",
        what="choices",
        gpu=HALF_GPU,
    ),
    "arrival-before-the-block-is-done": Bug(
        (Edit(LAST, FIRST, FIRST.removeprefix("  __syncthreads();\n")),),
        "no barrier of the block beside its arrival",
    ),
    "arrival-before-its-fence": Bug(
        (Edit(LAST, "memory_fence();\n    *flag", "*flag"),), "no fence between the barrier"
    ),
    "takes-over-without-a-fence": Bug(
        (Edit(LAST, "blocks - 1;\n    memory_fence();", "blocks - 1;"),),
        "no fence between an arrival",
    ),
    "fence-before-the-block-is-done": Bug(
        (Edit(LAST, FIRST, "  memory_fence();\n" + FIRST),
         Edit(LAST, "    memory_fence();\n    *flag", "    *flag")),
        "no fence between the barrier",
    ),
    "early-launch-that-the-code-does-not-know": Bug(
        (Edit(LAUNCH, "std::min(chip.capability, loaded.ptxVersion)", "chip.capability"),),
        "an early launch",
        arch=OLD_CODE,
    ),
    "cluster-that-the-code-does-not-know": Bug(
        (Edit(PLAN, "plan.cluster = chip.clusters()", "plan.cluster = chip.capability >= 90"),),
        "",
        what="choices",
        arch=OLD_CODE,
    ),
    "merge-that-skips-the-remainder": Bug(
        (Edit(MERGE, "if (done >= count) return;", "if (done >= 0) return;"),), ""
    ),
    "merge-that-joins-a-part-twice": Bug(
        (Edit(MERGE, "done += kFlight) {", "done += kFlight - 1) {"),), "", gpu=HALF_GPU
    ),
    "merge-that-counts-surplus-loads": Bug(
        (Edit(MERGE, "value[u], done + u < count);", "value[u], true);"),), ""
    ),
    "global-histogram-of-a-neighbour": Bug(
        (Edit(SELECT, "all[rank * kSelectBins + i]", "all[i]"),), "", what="choices", gpu=HALF_GPU
    ),
    "global-histogram-lost": Bug(
        (Edit(SELECT, "other < kSelectBlocks; ++other) {\n        sum += load_fresh",
              "other < kSelectBlocks - 1; ++other) {\n        sum += load_fresh"),),
        "",
        what="choices",
        gpu=HALF_GPU,
    ),
    "keys-of-another-row": Bug(
        (Edit(SELECT, "return args.keys + b * args.keys_row + i;", "return args.keys + i;"),),
        "",
        what="choices",
        gpu=HALF_GPU,
    ),
    "page-that-is-not-there": Bug(
        (Edit(CANDIDATES, "&& !has_key(args.kv, b, position[u])", "&& false"),),
        "",
        what="garbage",
    ),
    "page-beyond-the-pool": Bug(
        (Edit(ROW, "page < kv.pages ? page", "page <= 1000000 ? page"),),
        "",
        asan=True,
        what="garbage",
    ),
    "histogram-race-clear": Bug(
        (Edit(RADIX, "scratch.bins[i] = 0;\n  __syncthreads();", "scratch.bins[i] = 0;"),), ""
    ),
    "histogram-race-read": Bug(
        (Edit(RADIX, "  cluster_sync();\n  constexpr int kOwn", "  constexpr int kOwn"),),
        "no cluster barrier yet",
    ),
    "histogram-race-total": Bug(
        (Edit(RADIX, "  cluster_sync();\n  return scratch.total;", "  return scratch.total;"),), ""
    ),
    "candidates-past-their-run": Bug(
        (Edit(CANDIDATES, "(reach < end ? reach : end - 1)", "(reach < end ? index : index)"),),
        "",
        what="choices",
    ),
    "list-of-the-bin-alone": Bug(
        (Edit(SELECT, ">> pivot.shift >= pivot.prefix", ">> pivot.shift == pivot.prefix"),),
        "",
        what="choices",
    ),
    "list-read-before-it-is-written": Bug(
        (Edit(SELECT, "__syncwarp();  // the other", "// the other"),),
        "",
        what="choices",
        gpu=SCARCE,
    ),
    "ties-not-counted": Bug(
        (Edit(SELECT, "is_equal(key) && ties < pivot", "is_equal(key) && ties <= pivot"),), ""
    ),
    "fragment-not-turned": Bug(
        (Edit(MMA, "b[n][0] = transpose_matrix(Element<T>::pack(p[n * 4], p[n * 4 + 1]));",
              "b[n][0] = Element<T>::pack(p[n * 4], p[n * 4 + 1]);"),),
        "",
    ),
}  # fmt: skip


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
