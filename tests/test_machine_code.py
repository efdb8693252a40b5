"""The machine code of the CUDA kernels waits for memory no more often than the table allows.

No GPU is needed: SASS says what is in flight, and one warp is walked through it with the arguments
of a launch. Planted faults show that each kind of wait would be seen.
"""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from machine_code import facts, launches, limits, report, sass
from machine_code.walk import ARRAY_BITS
from proof_tools import NVCC, version_of

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(NVCC is None, reason="no nvcc, on PATH or among Python's packages"),
    pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm, on PATH or in Triton"),
]
SOURCES = launches.SOURCES


@pytest.fixture(scope="module")
def more():
    """One more trip where the compiler is another one."""
    return 0 if (version_of("nvcc") or "").startswith(limits.PINNED) else 1


def kernels(source, target="90", root=launches.ROOT):
    return sass.read(launches.cubin(source, target, root))


# --- the reader itself ------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_no_register_is_used_before_its_scoreboard_is_waited_for(source):
    for kernel in kernels(source).values():
        loads, wrong = facts.touched_too_early(kernel)
        assert loads > 30 and not wrong, (kernel.name, wrong)


@pytest.mark.parametrize("float8", (False, True))
@pytest.mark.parametrize("name", ("dense", "anchor-pruned", "follower"))
def test_the_walked_copies_ask_for_each_key_of_the_row_once(name, float8):
    step = launches.Step(name, 1, 540, spans=3, float8=float8)
    use = facts.Use(step, "score_" if name == "anchor-pruned" else "attend")
    copied = facts.Counter()
    for block in range(use.walk(0).parts):
        for warp in range(use.launch.threads // 32):
            copied += use.walk(block, warp).copied
    copied = facts.Counter({at: n for at, n in copied.items() if at >> ARRAY_BITS in (1, 2)})
    sides = (1,) if name == "anchor-pruned" else (1, 2)
    keys = launches.key_positions(step) if name == "follower" else range(step.text + step.visual)
    wanted = {(s << ARRAY_BITS) + p * step.key_bytes + c for s in sides for p in keys
              for c in range(0, step.key_bytes, 16)}  # fmt: skip
    assert set(copied) == wanted
    assert set(copied.values()) == {16}


# --- what the table allows ----------------------------------------------------------------------


@pytest.mark.parametrize("name", limits.STREAMS)
def test_a_stream_kernel_waits_no_more_than_the_table_allows(name, more):
    limit = limits.STREAMS[name]
    walk = limit.use.walk()
    chain = facts.chain_of(walk, limit.use.step)
    assert chain.trips_before <= limit.before + more, chain
    assert chain.trips_behind <= limit.behind + more, chain
    assert chain.tile_instructions <= limit.tile, chain
    assert facts.executed(walk, *facts.BARRIERS) <= limit.barriers
    # the fence of each arrival is for one warp
    assert facts.executed(walk, "MEMBAR") == facts.executed(walk, "ATOMG")
    assert facts.executed(limit.use.walk(warp=1), "MEMBAR") == 0


@pytest.mark.parametrize("name", limits.ALONE)
def test_a_kernel_without_keys_waits_no_more_than_the_table_allows(name, more):
    limit = limits.ALONE[name]
    walk = limit.use.walk()
    assert walk.level <= limit.trips + more
    assert facts.executed(walk, "BAR") <= limit.barriers
    assert facts.executed(walk, "UCGABAR_WAIT") <= limit.cluster_barriers
    assert facts.executed(walk, "MEMBAR") <= limit.fences


@pytest.mark.parametrize("source", SOURCES)
def test_only_the_loops_of_the_table_load_one_thing_at_a_time(source, more):
    for name, kernel in kernels(source).items():
        limit = limits.LOOPS[name]
        serial = [loop for loop in sass.loops_of(kernel) if loop.serial]
        assert len(serial) <= limit.serial + more, (name, serial)
        assert len(facts.serial_merges(kernel)) <= limit.strong, name


@pytest.mark.parametrize("kv_heads", (1, 2, 8))
@pytest.mark.parametrize("group", range(1, 33))
def test_no_group_waits_often_behind_its_last_key(group, kv_heads):
    """However many splits a row has: with few KV heads it has the most."""
    step = launches.Step("dense", 1, 16384, heads=group * kv_heads, kv_heads=kv_heads)
    chain = facts.chain_of(facts.Use(step, "attend").walk(), step)
    assert chain.trips_behind <= limits.MOST_BEHIND, chain


@pytest.mark.parametrize("kind", ("bf16_d128_h8", "bf16_d128_h32", "bf16_d128_h64", "fp8_d128_h8"))
@pytest.mark.parametrize("source", ("attend", "score"))
def test_the_merge_of_splits_has_its_copies_under_way_together(source, kind):
    kernel = kernels(source)[f"vp_{source}_{kind}"]
    copies = [loop.copies for loop in facts.merge_copies(kernel)]
    assert max(copies, default=0) == limits.SUMS_TOGETHER, copies
    assert not facts.serial_merges(kernel)


@pytest.mark.parametrize(
    "source, target", [*((source, "90") for source in SOURCES), ("attend", "80"), ("select", "80")]
)
def test_memory_is_ordered_on_every_way(source, target):
    for name, kernel in kernels(source, target).items():
        assert not facts.unfenced_arrivals(kernel), name
        assert not facts.heavy_fences(kernel), name
        if target == "90":
            assert not facts.accesses_before_the_wait(kernel), name


def test_a_cluster_is_launched_only_where_its_kernel_is_not_empty():
    step = launches.Step("anchor-pruned", 1, 16384)
    for target, facts_of in (("90", launches.H200), ("80", (80, 108, 166912))):
        launched = next(
            one for one in launches.launches_of(step, facts_of) if "select" in one.kernel
        )
        assert not is_empty(kernels("select", target)[launched.kernel]), (target, launched.kernel)
    assert is_empty(kernels("select", "80")["vp_select_cluster"])


def is_empty(kernel):
    return not any(i.is_global for i in kernel.code)


@pytest.mark.parametrize("table", report.TABLES)
def test_the_page_of_bounds_has_the_predictions_of_this_code(table, more):
    if more:  # another compiler has other cycles
        return
    page = report.PAGE.read_text()
    made = "\n".join(report.TABLES[table]())
    assert made in page, "run: python tests/machine_code/report.py --write"


# --- planted faults -----------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path):
    """A copy of the kernels in which some texts are others."""

    def edit(*edits):
        for folder in ("kernels/cuda", "kernels/common"):
            shutil.copytree(launches.ROOT / folder, tmp_path / folder)
        for path, before, after in edits:
            text = (tmp_path / path).read_text()
            assert text.count(before) == 1, f"{path}: {before!r} must stand there once"
            (tmp_path / path).write_text(text.replace(before, after))
        return tmp_path

    return edit


def attend_of(root):
    return kernels("attend", root=root)["vp_attend_bf16_d128_h8"]


def test_copies_of_a_merge_that_wait_for_each_other_are_seen(planted):
    step = "      part += kSplitsAhead;\n"
    waits = "      copy_commit(), copy_wait<0>();\n"
    root = planted(("kernels/cuda/merge.cuh", step, waits + step))
    limit = limits.STREAMS["dense"]
    assert facts.chain_of(limit.use.walk(root=root), limit.use.step).trips_behind > limit.behind + 1


@pytest.mark.parametrize("before, after", (
    ("memory_fence();\n    *flag", "*flag"), ("count_and_acquire(", "atomicInc("),
))  # fmt: skip
def test_a_lost_fence_is_seen(planted, before, after):
    root = planted(("kernels/cuda/arrival.cuh", before, after))
    assert len(facts.unfenced_arrivals(attend_of(root))) == 1


def test_a_missing_wait_is_seen(planted):
    wait = "wait_for_previous();\n  // Asked"
    root = planted(("kernels/cuda/stream.cuh", wait, "// Asked"))
    assert facts.accesses_before_the_wait(attend_of(root))


def test_an_empty_cluster_kernel_is_seen(planted):
    root = planted(("kernels/cuda/select.cu", "__CUDA_ARCH__ >= 900", "__CUDA_ARCH__ >= 9000"))
    assert is_empty(kernels("select", root=root)["vp_select_cluster"])
