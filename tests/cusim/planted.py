"""Bugs that the simulated GPU must catch, each a change to one source."""

from dataclasses import dataclass

from build import Edit

HALF_GPU = "80,5,101376"  # no clusters, and less shared memory
SCARCE = "80,1,30000"  # neither, and no room for the keys of a long row
CRAMPED = "90,1,20000"  # clusters, and no room for a block's part of it
OLD_CODE = "80"  # what sm_80, 86 and 89 run, and newer chips where the build has no other
ONE_SM = "90,1,232448"  # few splits: every warp meets more tiles than it has stages
MANY = "90,20,232448"  # as many splits as there are keys for
MOST = "90,132,232448"  # so many that groups of them are merged first

LAUNCH = "csrc/cuda/launch.cpp"
STREAM, MERGE = "kernels/cuda/stream.cuh", "kernels/cuda/merge.cuh"
PLAN, ARRIVAL, SPANS = "csrc/cuda/plan.cpp", "kernels/cuda/arrival.cuh", "kernels/cuda/spans.cuh"
DOTS, MMA = "kernels/cuda/dot_tile.cuh", "kernels/cuda/mma_tile.cuh"
SELECT, RADIX = "kernels/cuda/select.cu", "kernels/cuda/radix.cuh"
CANDIDATES = "kernels/cuda/candidates.cuh"
FLOAT8, FLOAT8_TILE = "kernels/cuda/float8.cuh", "kernels/cuda/float8_tile.cuh"
HALF_QUERIES = "kernels/cuda/half_queries.cuh"


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
RAISED = "if (!__any_sync(kAllLanes, raised)) return;"
FIRST = "  __syncthreads();\n  if (threadIdx.x == 0) {"
FIND = "    next_key = finder.find(args, work, own_index());\n"
LOOK_AHEAD = "    finder.look_ahead(args, work, own_index());\n"
MEMBER = "  // the next tile of this member\n"
LANDED = (
    "if (kBulk && args.bulk) copy_barrier_wait(barriers + stage, phase);\n      wait_for_team();"
)
BUGS = {
    "missing-barrier-after-wait": Bug(
        (Edit(STREAM, LANDED, LANDED.removesuffix("wait_for_team();")),), ""
    ),
    "short-wait": Bug(
        (Edit(STREAM, WAIT, "copy_wait_for(args.stages);"),), ""
    ),
    "team-that-does-not-wait": Bug(
        (Edit(STREAM, "team_barrier(1 + team, args.team * kThreadsPerWarp);", "__syncwarp();"),), ""
    ),
    "teams-that-wait-for-each-other": Bug(
        (Edit(STREAM, "team_barrier(1 + team, args.team", "team_barrier(1, args.team"),), ""
    ),
    "member-that-counts-no-group": Bug(
        (Edit(STREAM, "== member) prefetch(refill);\n      copy_commit();",
              "== member) prefetch(refill), copy_commit();"),),
        "",
    ),
    "missing-barrier-before-weights": Bug(
        (Edit(DOTS, "= p[i];\n    __syncwarp();", "= p[i];"),), "", dtype="float32"
    ),
    "missing-barrier-before-merge": Bug(
        (Edit(STREAM, "  __syncthreads();\n  merge_teams<", "  merge_teams<"),), ""
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
        (Edit(DOTS, "__shfl_xor_sync(kAllLanes, sent", "__shfl_xor_sync(0xffffu, sent"),),
        "not in its own mask",
        dtype="float32",
    ),
    "half-a-warp-skips": Bug(
        (Edit(STREAM, RAISED, "if (lane_id() < 16 && !raised) return;\n    " + RAISED),),
        "",
    ),
    "off-by-one-key": Bug(
        (Edit(STREAM, "index < work.end ? index", "index <= work.end ? index"),), ""
    ),
    "list-of-the-tile-before": Bug(
        (Edit(STREAM, FIND, FIND + LOOK_AHEAD), Edit(STREAM, MEMBER + LOOK_AHEAD, MEMBER)), ""
    ),
    "off-by-one-read": Bug(
        (Edit("kernels/cuda/queries.cuh", "&& d < args.head_dim", "&& d <= args.head_dim"),),
        "heap-buffer-overflow",
        asan=True,
    ),
    "off-by-one-write": Bug(
        (Edit(MERGE, "if (d + u < args.head_dim)", "if (d + u <= args.head_dim)"),),
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
        (Edit(STREAM, "wait_for_team();  // the stage", "// the stage"),), "", landing="early"
    ),
    "bulk-not-awaited": Bug(
        (Edit(STREAM, LANDED, "wait_for_team();"),), "", dtype="float32"
    ),
    "bulk-phase-not-flipped": Bug(
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
    "bulk-of-keys-apart": Bug(
        (Edit(STREAM, "apart && lane_id() < Tile::kKeys", "apart && lane_id() < 0"),),
        "",
        dtype="float32",
    ),
    "counter-not-rearmed": Bug(
        (Edit(ARRIVAL, "(counter, blocks - 1)", "(counter, blocks + 6)"),), ""
    ),
    "last-but-one-takes-over": Bug(
        (Edit(ARRIVAL, "blocks - 1) == blocks - 1", "blocks - 1) == blocks - 2"),),
        "",
        what="choices",
        gpu=HALF_GPU,
    ),
    "arrival-before-the-block-is-done": Bug(
        (Edit(ARRIVAL, FIRST, FIRST.removeprefix("  __syncthreads();\n")),),
        "no barrier of the block beside its arrival",
    ),
    "arrival-before-its-fence": Bug(
        (Edit(ARRIVAL, "memory_fence();\n    *flag", "*flag"),), "no fence between the barrier"
    ),
    "takes-over-without-an-acquire": Bug(
        (Edit(ARRIVAL, "count_and_acquire(", "atomicInc("),),
        "no fence between an arrival",
    ),
    "fence-before-the-block-is-done": Bug(
        (Edit(ARRIVAL, FIRST, "  memory_fence();\n" + FIRST),
         Edit(ARRIVAL, "    memory_fence();\n    *flag", "    *flag")),
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
    "launch-beside-its-device": Bug(
        (Edit(LAUNCH, 'check("cudaSetDevice", cudaSetDevice(device_))', "return"),),
        "a stream of a device that is not current",
        what="devices",
    ),
    "device-left-behind": Bug(
        (Edit(LAUNCH, "if (before_ != device_) cudaSetDevice(before_);", ""),),
        "",
        what="devices",
    ),
    "kernel-loaded-in-a-strict-capture": Bug(
        (Edit(LAUNCH, "= cudaStreamCaptureModeRelaxed", "= cudaStreamCaptureModeGlobal"),),
        "",  # the first of all is asked what it was compiled for, by no entry's name
        what="devices",
    ),
    "anchor-that-a-dense-layer-does-not-load": Bug(
        (Edit("csrc/cuda/engine.cpp", "{Stage::kAttend, Stage::kScore}", "{Stage::kAttend}"),),
        "a kernel is loaded while a graph is captured",
        what="devices",
    ),
    "shared-memory-of-another-device": Bug(
        (Edit(LAUNCH, "allowed[{function, device}]", "allowed[{function, 0 * device}]"),),
        "more shared memory than the kernel was allowed",
        what="devices",
    ),
    "shared-memory-that-the-driver-chooses": Bug(
        (Edit(LAUNCH, "cudaSharedmemCarveoutMaxShared", "0"),),
        "a kernel leaves its shared memory to the driver",
    ),
    "merge-that-skips-the-remainder": Bug(
        (Edit(MERGE, "done < count; done +=", "done + 7 < count; done +="),), "", gpu=MANY
    ),
    "merge-that-counts-a-part-twice": Bug(
        (Edit(MERGE, "part += kSplitsAhead;", "part += kSplitsAhead, from -= pitch;"),),
        "",
        gpu=MANY,
    ),
    "merge-that-counts-what-lies-behind-the-last-split": Bug(
        (Edit(MERGE, "if (i >= states) held", "if (i > padded) held"),), ""
    ),
    "merge-of-states-under-way": Bug(
        (Edit(MERGE, "copy_wait<2>();", "copy_wait<3>();"),), "", gpu=MANY
    ),
    "merge-of-sums-under-way": Bug(
        (Edit(MERGE, "copy_wait<1>();", "copy_wait<2>();"),), "", what="groups", gpu=MOST
    ),
    "group-that-its-first-blocks-merge": Bug(
        (Edit(MERGE, "parts.count, flag)", "parts.all ? parts.count : 1, flag)"),),
        "",
        what="groups",
        gpu=MOST,
    ),
    "groups-that-share-a-counter": Bug(
        (Edit(MERGE, "head * kMostGroups + parts.first / args.merge.fan", "head * kMostGroups"),),
        "",
        what="groups",
        gpu=MOST,
    ),
    "group-merged-by-another-block-of-the-row": Bug(
        (Edit(MERGE, "parts.count, flag)) {", "parts.all ? work.splits : parts.count, flag)) {"),),
        "",
        what="groups",
        gpu=MOST,
    ),
    "groups-that-lie-side-by-side": Bug(
        (Edit(MERGE, "return {0, rule.fan, (work", "return {0, 1, (work"),),
        "",
        what="groups",
        gpu=MOST,
    ),
    "group-whose-state-is-lost": Bug(
        (Edit(MERGE, "stats[own] = float4{all.m", "if (!count) stats[own] = float4{all.m"),),
        "",
        what="groups",
        gpu=MOST,
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
    "codes-of-another-row": Bug(
        (Edit(SELECT, "return args.sort_codes + b * args.codes_stride + i;",
              "return args.sort_codes + i;"),),
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
        (Edit(SPANS, "page < kv.pages ? page", "page <= 1000000 ? page"),),
        "",
        asan=True,
        what="garbage",
    ),
    "histogram-race-clear": Bug(
        (Edit(RADIX, "uint4{0, 0, 0, 0};\n  __syncthreads();", "uint4{0, 0, 0, 0};"),), ""
    ),
    "histogram-of-the-pass-before": Bug(
        (Edit(RADIX, "+ lowest) = uint4{0, 0, 0, 0}", "+ lowest) = bins"),),
        "",
        what="choices",
    ),
    "histogram-race-read": Bug(
        (Edit(RADIX, "  cluster_sync();\n  constexpr int kOwn", "  constexpr int kOwn"),),
        "no cluster barrier yet",
    ),
    "histogram-race-total": Bug(
        (Edit(RADIX, "  cluster_sync();\n  return scratch.row_histogram;",
              "  return scratch.row_histogram;"),), ""
    ),
    "candidates-past-their-span": Bug(
        (Edit(CANDIDATES, "(reach < end ? reach : end - 1) < at.next",
              "(reach < end ? index : index) < at.next"),),
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
        (Edit(SELECT, "is_equal(code) && ties < pivot", "is_equal(code) && ties <= pivot"),), ""
    ),
    "fragment-not-transposed": Bug(
        (Edit(MMA, "b[n][0] = transpose_matrix(Element<T>::pack(p[n * 4], p[n * 4 + 1]));",
              "b[n][0] = Element<T>::pack(p[n * 4], p[n * 4 + 1]);"),),
        "",
    ),
    "float8-nan-that-is-480": Bug(
        (Edit(FLOAT8, " | (of_nan >> 1 & 0x40004000)", " | (of_nan & 0)"),), "", dtype="float8"
    ),
    "float8-subnormals-lost": Bug(
        (Edit(FLOAT8, "upper >> 1 & 0x3f803f80", "upper >> 1 & 0x3c003c00"),), "", dtype="float8"
    ),
    "float8-columns-of-another-key": Bug(
        (Edit(FLOAT8_TILE, "widen(pick_bytes(v[2], v[3], selector))",
              "widen(pick_bytes(v[3], v[2], selector))"),),
        "",
        dtype="float8",
    ),
    "float8-copy-that-is-not-turned": Bug(
        (Edit("kernels/cuda/tile_copy.cuh", "tile + Tile::chunk_offset(key, chunk)",
              "tile + key * Tile::kKeyBytes + chunk * 16"),),
        "",
        dtype="float8",
    ),
    "float8-query-out-of-range": Bug(
        (Edit(HALF_QUERIES, "wanted = 13 + 254 - exponent", "wanted = 127 + 0 * exponent"),),
        "",
        dtype="float8",
    ),
    "float8-power-not-taken-back": Bug(
        (Edit(HALF_QUERIES, "bits_float((254 - power) << 23)", "1.0f"),), "", dtype="float8"
    ),
    "float8-scale-of-k-lost": Bug(
        (Edit(HALF_QUERIES, "k_scale(scale_of(of.kv.k_scale, kv_head_of<kSeveral>(of)))",
              "k_scale(1.0f)"),),
        "",
        dtype="float8",
    ),
    "float8-scale-of-another-head": Bug(
        (Edit(STREAM, "scale_of(args.kv.v_scale, kv_head_of<kSeveral>(args))",
              "scale_of(args.kv.v_scale, 0)"),),
        "",
        dtype="float8",
    ),
}  # fmt: skip
