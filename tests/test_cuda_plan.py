"""How the CUDA engine cuts work: host functions, tested on facts of chips that are not here."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cusim"))
from build import FEW, build, load

NO_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is None
pytestmark = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")

# (compute capability, multiprocessors, shared memory that a block may ask for)
CHIPS = {
    "a100": (80, 108, 166912),
    "rtx3090": (86, 82, 101376),
    "l4": (89, 58, 101376),
    "h200": (90, 132, 232448),
    "b200": (100, 148, 232448),
    "rtx5090": (120, 170, 101376),
}
# Of kernels: the dtype of q, K and V, or K and V of 8 bits beside q of 16 or 32.
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "float8": 3, "float8-float32": 4}
HEAD_DIMS = (16, 64, 72, 80, 96, 128, 192, 256)
GROUPS = (1, 4, 5, 8, 9, 16, 17, 24, 32)
STREAMS = ((True, True), (True, False), (False, True))

by_chip = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS.keys())


@pytest.fixture(scope="module")
def engine():
    return load(build(kernels=FEW))


@pytest.fixture(scope="module")
def whole_engine():
    return load()


def shape(kind="bfloat16", rows=1, group=4, kv_heads=8, head_dim=128, capacity=16384):
    return (KINDS[kind], rows, group * kv_heads, kv_heads, head_dim, capacity)


@pytest.mark.deep
@by_chip
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_fits_with_stages_to_spare(whole_engine, chip, kind):
    for head_dim in HEAD_DIMS:
        for group in GROUPS:
            for keys, values in STREAMS:
                of = shape(kind, group=group, head_dim=head_dim)
                plan = whole_engine.plan(keys, chip, of, keys, values)
                assert plan["shared_bytes"] <= chip[2]
                assert plan["stages"] >= 2 and plan["warps"] in (1, 2, 4)
                assert plan["warps"] % plan["team"] == 0
                assert group <= plan["team"] * plan["warp_heads"] <= plan["head_tile"]


@pytest.mark.parametrize("kind, dtype", (("bfloat16", "bf16"), ("float8", "fp8")))
@pytest.mark.parametrize(
    "group, kernel, team",
    ((1, "h8", 1), (4, "h8", 1), (8, "h8", 1), (16, "h32", 1), (32, "h32", 2)),
)
def test_two_blocks_of_the_common_shape_share_an_h200(engine, group, kernel, team, kind, dtype):
    """And have the bytes on their way that hide a trip to memory."""
    for values in (True, False):
        plan = engine.plan(True, CHIPS["h200"], shape(kind, group=group), True, values)
        assert plan["kernel"] == f"vp_score_{dtype}_d128_{kernel}"
        assert plan["warps"] == 4 and plan["stages"] >= 3 and plan["team"] == team
        assert 2 * (plan["shared_bytes"] + 1024) <= CHIPS["h200"][2] + 1024
        # of a multiprocessor: 32 bytes a nanosecond over the 800 of a trip, twice at least
        tiles = 2 * plan["warps"] // team * (plan["stages"] - 1)
        assert tiles * plan["stage_bytes"] >= 2 * 32 * 800


@by_chip
def test_the_copy_engine_is_used_where_it_pays(engine, chip):
    auto, plain, bulk = range(3)
    assert engine.bulk_copies(chip, auto) == (chip[0] in (90, 100))
    assert not engine.bulk_copies(chip, plain)
    if chip[0] >= 90:
        assert engine.bulk_copies(chip, bulk)
    else:
        with pytest.raises(ValueError, match=f"this GPU has {chip[0] / 10}"):
            engine.bulk_copies(chip, bulk)


@by_chip
def test_a_row_is_cut_by_itself_alone(engine, chip):
    """Neither the batch nor the capacity moves a cut; the grid has room for every part."""
    for kv_heads in (1, 2, 8, 32):
        plans = [
            engine.plan(False, chip, shape(rows=b, kv_heads=kv_heads, capacity=n), True, True)
            for b in (1, 7, 64)
            for n in (1, 1000, 131072, 1 << 20)
        ]
        for same in ("rule", "merge", "warps", "stages", "shared_bytes"):
            assert len({plan[same] for plan in plans}) == 1, same


@by_chip
def test_the_grid_holds_every_part(engine, chip):
    for kv_heads in (1, 2, 3, 8, 32, 200):
        for capacity in (1, 63, 64, 65, 1000, 4097, 131072):
            plan = engine.plan(False, chip, shape(kv_heads=kv_heads, capacity=capacity), True, True)
            for length in {0, 1, capacity // 3, capacity - 1, capacity}:
                splits = engine.splits(plan["rule"], length, kv_heads)
                assert splits <= plan["max_splits"], (kv_heads, capacity, length)


@by_chip
def test_a_kernel_cuts_a_row_as_the_rule_says_without_a_division(engine, chip):
    """It multiplies by a reciprocal, and a tile is a power of two."""
    dice = random.Random(1)
    for kv_heads in (1, 3, 8, 200, 4096):
        rule = engine.plan(False, chip, shape(kv_heads=kv_heads), True, True)["rule"]
        assert rule[2].bit_count() == 1
        edges = [n * rule[0] // kv_heads + by for n in (1, 7, 4096) for by in (-1, 0, 1)]
        for keys in [0, (1 << 30) - 1, *edges, *(dice.randrange(1 << 30) for _ in range(200))]:
            by_rule, by_kernel = engine.split_lengths(rule, max(keys, 0), kv_heads)
            assert by_rule == by_kernel, (rule, keys, kv_heads)


@by_chip
def test_a_merge_of_many_heads_takes_whole_steps(engine, chip):
    """Each step of 8 splits is taken for each output that a thread of the block has."""
    for group in (5, 7, 8, 16, 32):
        for kv_heads in (1, 2, 4, 8):
            of = shape(group=group, kv_heads=kv_heads)
            parts = engine.plan(False, chip, of, True, True)["rule"][0] // kv_heads
            assert parts % 8 == 0 or parts < 8, (group, kv_heads, parts)


def trips_of_a_merge(plan, heads, splits):
    """Waits for memory behind the last key: arrivals, and copies of two batches at a time."""
    at_once, fan, steps = plan["merge"]
    levels = (splits,) if splits <= at_once else (min(fan, splits), -(-splits // fan))
    outputs = -(-heads * 128 // (4 * 32 * plan["warps"]))
    return sum(1 + -(-outputs * -(-parts // 8) // (2 * steps)) for parts in levels)


@by_chip
def test_no_merge_takes_more_than_ten_trips(engine, chip):
    """Of any group, any number of KV heads, any length of a row. Blocks of an A100 hold less."""
    most = 14 if chip[0] == 80 else 10
    for group in range(1, 33):
        for kv_heads in (1, 2, 3, 4, 8, 16):
            plan = engine.plan(False, chip, shape(group=group, kv_heads=kv_heads), True, True)
            assert plan["merge"][2] >= 1
            for keys in (4096, 16640, 131072, 1 << 20):
                splits = engine.splits(plan["rule"], keys, kv_heads)
                trips = trips_of_a_merge(plan, group, splits)
                assert splits == 1 or trips <= most, (group, kv_heads, splits, plan["merge"])


@by_chip
def test_groups_of_splits_have_counters_and_few_parts(engine, chip):
    """The workspace has a counter for each query head: of the row, and eight of groups."""
    for group in (1, 4, 8, 9, 16, 32):
        for kv_heads in (1, 2, 8):
            plan = engine.plan(False, chip, shape(group=group, kv_heads=kv_heads), True, True)
            at_once, fan, _ = plan["merge"]
            most = engine.splits(plan["rule"], 1 << 29, kv_heads)
            assert most <= at_once or (group >= 9 and most <= 8 * fan), (group, kv_heads)
            assert at_once >= min(fan, most) and fan % 8 == 0


def test_one_row_fills_an_h200(engine):
    """A follower at 5 % of 16k, and the dense layer before it."""
    plan = engine.plan(False, CHIPS["h200"], shape(), True, True)
    for keys in (256 + 819, 16384):
        assert 8 * engine.splits(plan["rule"], keys, 8) >= 132


@by_chip
def test_select_keeps_its_codes_where_they_fit(engine, chip):
    for candidates in (0, 1, 4096, 131072, 1 << 20):
        plan = engine.plan_select(chip, candidates)
        assert plan["cluster"] == (chip[0] >= 90)
        assert plan["blocks"] == (8 if plan["cluster"] or candidates > 2048 else 1)
        assert plan["shared_bytes"] <= chip[2]
        hands_over = not plan["cluster"] and plan["blocks"] > 1
        assert bool(plan["histograms"]) == hands_over
        # by one block of a cluster, or by the last of a row
        fits = plan["cached"] * (8 if plan["cluster"] else 1) >= candidates
        assert plan["codes_stride"] >= candidates * (hands_over or not fits)
        assert fits or chip[2] - plan["shared_bytes"] < 64


@pytest.mark.parametrize("chip", ("h200", "b200", "rtx5090"))
def test_older_code_gets_nothing_that_it_lacks(engine, chip):
    """A build for sm_80 alone, which the driver compiles for the chip at hand."""
    facts, (auto, plain, bulk) = (*CHIPS[chip], 80), range(3)
    assert not engine.plan_select(facts, 131072)["cluster"]
    assert not engine.bulk_copies(facts, auto) and not engine.bulk_copies(facts, plain)
    with pytest.raises(ValueError, match=r"this GPU has .* kernels built for 8\.0"):
        engine.bulk_copies(facts, bulk)


def test_a_head_dim_without_kernel_is_refused_by_name(engine):
    with pytest.raises(ValueError, match="head dim 257"):
        engine.plan(False, CHIPS["h200"], shape(head_dim=257), True, True)


@pytest.mark.deep
def test_the_page_of_bounds_is_what_plans_and_registers_imply():
    """Bytes and occupancy in the documentation are the output of a script, not typed."""
    script = Path(__file__).parent / "cusim" / "bounds.py"
    made = subprocess.run([sys.executable, script], check=True, text=True, stdout=subprocess.PIPE)
    page = (Path(__file__).parents[1] / "docs" / "internals" / "cuda-bounds.md").read_text()
    for table in made.stdout.strip().split("\n\n"):
        assert table in page, f"docs/internals/cuda-bounds.md lacks what bounds.py prints:\n{table}"
