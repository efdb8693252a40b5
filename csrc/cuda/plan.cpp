// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/entries.cuh"
#include "kernels/cuda/shared_layout.h"

namespace visionpulse::cuda {

namespace {

constexpr int32_t kMostStages = 6;    // more are not told apart by the wait
constexpr int32_t kEnoughStages = 3;  // hide a trip to memory behind two tiles
constexpr int32_t kMostSplits = 128;  // what one block merges in about the time of a tile
constexpr int32_t kMostStates = kMostSplits * kMaxGroup;  // of the heads of all splits
constexpr int32_t kQueryTile = 2 * kMaxGroup;             // heads of several queries
constexpr int32_t kBlocksPerChip = 2;                     // per multiprocessor, of one row
constexpr int32_t kMergeColumns = 4 * kMaxWarps * kThreadsPerWarp;  // that a block merges at once
// Keys of a list that pay for a block's start and end, which take about as long as two tiles of
// each warp: many short rows have more blocks than the chip holds at once.
constexpr int32_t kShortestList = 128;
constexpr int32_t kOneBlock = 4 * kSelectThreads;  // candidates that a block reads in one go
constexpr int32_t kReserved = 1024;  // shared memory that each resident block costs beside its own
constexpr int32_t kNoLongest = 1 << 30;

int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }
int32_t round_up(int32_t a, int32_t b) { return ceil_div(a, b) * b; }

// The smallest head tile that holds a group of query heads.
int32_t head_tile_of(Kind kind, int32_t group) {
  if (kind == Kind::kFloat8Beside32) return kMaxGroup;
  const int32_t least = kind == Kind::kFloat32 ? 4 : 8;
  return group <= least ? least : kMaxGroup;
}

// The head dim that the kernels pad D to; 0 when they have none.
int32_t padded_head_dim(Kind kind, int32_t head_dim, bool several) {
  const bool float8 = kind == Kind::kFloat8Beside16 || kind == Kind::kFloat8Beside32;
#define VP_DIM(unused, d) \
  if (head_dim <= d) return d;
  if (several) {
    if (kind == Kind::kFloat32 && head_dim <= 128) return 128;
    if (kind == Kind::kFloat32 || kind == Kind::kFloat8Beside32) return 256;
    VP_QUERY_HEAD_DIMS(VP_DIM, )
  } else if (float8) {
    VP_FLOAT8_HEAD_DIMS(VP_DIM, )
  } else {
    VP_HEAD_DIMS(VP_DIM, )
  }
#undef VP_DIM
  return 0;
}

// Warps that hold some query heads together; the kernels count in powers of two.
int32_t team_of(const StreamKernel& kernel, int32_t heads) {
  int32_t team = 1;
  while (team * kernel.warp.heads < heads) team *= 2;
  return team;
}

// Bytes of sums that one multiprocessor takes from L2, 64 in a cycle, while a block that merged a
// group arrives once more: fence, counter, the first trip behind it.
constexpr int32_t kArrivalBytes = 160 << 10;

// Groups of splits are merged first where that pays: blocks then share the bytes of which one would
// read all. `splits` are the most of a row, `heads` those of a block, `part_bytes` the sums of one
// split.
MergeRule merge_rule(int32_t splits, int32_t heads, int32_t part_bytes) {
  MergeRule rule = {splits, round_up(ceil_div(splits, kMostGroups), kSplitsAhead), 0};
  // The workspace has a counter for each query head.
  if (heads < 1 + kMostGroups) return rule;
  rule.at_once = std::min(splits, rule.fan);
  const auto saved = [&](int32_t n) { return n - rule.fan - ceil_div(n, rule.fan); };
  while (rule.at_once < splits && int64_t{saved(rule.at_once + 1)} * part_bytes <= kArrivalBytes) {
    ++rule.at_once;
  }
  return rule;
}

// Chooses the warps and stages of a block. First four warps with enough stages so that two blocks
// share a multiprocessor, or three of a scan: without V a tile is half the bytes, and three hide
// what it computes; three too of several queries whose warps share tiles. Then the same for one
// block; then fewer warps.
void fit(StreamPlan& plan, const Chip& chip) {
  const WarpTile& warp = plan.kernel->warp;
  const int32_t parts = std::max({plan.merge.at_once, plan.merge.fan, kMostGroups});
  const int32_t merge = merge_floats(parts, plan.team * warp.heads) * 4;
  const int32_t sums = plan.v_bytes ? warp.sum_bytes : 0;
  const auto bytes_of = [&](int32_t warps, int32_t stages) {
    const SharedLayout at =
        shared_layout(warp, warps, plan.team, stages, plan.k_bytes + plan.v_bytes);
    return std::max({at.stages + warps / plan.team * at.team_pitch, at.sums + warps * sums,
                     at.stages + merge + 2 * merge_step_bytes(warps)});
  };
  const bool third = plan.v_bytes == 0 || (plan.team > 1 && plan.kernel->resident == 3);
  for (const int32_t blocks : {third ? 3 : kResidentBlocks, kResidentBlocks, 1}) {
    const int32_t limit = (chip.shared_bytes + kReserved) / blocks - kReserved;
    for (const int32_t warps : {4, 2, 1}) {
      if (warps < plan.team || (warps < 4 && blocks > 1)) break;
      for (int32_t stages = kMostStages; stages >= 2; --stages) {
        if (stages < kEnoughStages && (blocks > 1 || warps > plan.team)) break;
        const int32_t bytes = bytes_of(warps, stages);
        if (bytes > limit) continue;
        plan.warps = warps;
        plan.stages = stages;
        plan.shared_bytes = bytes;
        const SharedLayout at = shared_layout(warp, warps, plan.team, stages, 0);
        const int32_t steps = (bytes - at.stages - merge) / merge_step_bytes(warps);
        plan.merge.steps = steps / 2;
        return;
      }
    }
  }
  throw std::invalid_argument(std::string(plan.kernel->name) + " needs more than the " +
                              std::to_string(chip.shared_bytes) +
                              " bytes of shared memory of a block on this GPU");
}

}  // namespace

// By default on the chips with HBM: on sm_120 tiles were seen to come from L2 faster without.
bool bulk_copies(const Chip& chip, Copies requested) {
  const bool able = chip.bulk_copies();
  if (requested == Copies::kBulk && !able) {
    const auto version = [](int32_t of) {
      return std::to_string(of / 10) + "." + std::to_string(of % 10);
    };
    throw std::invalid_argument("bulk copies need compute capability 9.0, this GPU has " +
                                version(chip.capability) + " and runs kernels built for " +
                                version(chip.code) + "; ask for auto or async");
  }
  return requested == Copies::kAuto ? able && chip.capability < 120 : requested == Copies::kBulk;
}

const StreamKernel& kernel_of(Stage stage, const Shape& shape) {
  const int32_t group = shape.heads / shape.kv_heads;
  const bool several = shape.queries > 1;
  const int32_t head_tile = several ? kQueryTile : head_tile_of(shape.kind, group);
  const int32_t dim = padded_head_dim(shape.kind, shape.head_dim, several);
  const StreamKernel* kernel = stage == Stage::kScore ? score_kernel(shape.kind, dim, head_tile)
                                                      : attend_kernel(shape.kind, dim, head_tile);
  if (kernel == nullptr || group > head_tile) {
    throw std::invalid_argument("no kernel for head dim " + std::to_string(shape.head_dim) +
                                " and " + std::to_string(group) + " query heads per KV head");
  }
  return *kernel;
}

StreamPlan plan_stream(Stage stage, const Chip& chip, const Shape& shape, Streams streams) {
  const StreamKernel& kernel = kernel_of(stage, shape);
  StreamPlan plan = {};
  plan.kernel = &kernel;
  // A block holds what four warps do; the heads of long queries go to several blocks.
  const int32_t heads = shape.heads / shape.kv_heads * shape.queries;
  const int32_t most = std::min(kernel.head_tile, kMaxWarps * kernel.warp.heads);
  plan.head_blocks = ceil_div(heads, most);
  plan.team = team_of(kernel, std::min(heads, most));
  const int32_t held = plan.team * kernel.warp.heads;  // query heads, padded
  plan.k_bytes = streams.keys ? kernel.tile_bytes : held * kernel.warp.keys * 4;
  plan.v_bytes = streams.values ? kernel.tile_bytes : 0;

  const int32_t blocks = shape.kv_heads * plan.head_blocks;
  const int32_t limit = std::min(kMostSplits, kMostStates / held);
  // The parts of one row fill the chip alone, so that its bits do not depend on the batch.
  int32_t parts = std::min(std::max(kBlocksPerChip * chip.multiprocessors, blocks), limit * blocks);
  // Where a thread of the block that merges has several outputs, it takes each step of the merge
  // for each of them: no step for the sake of one split.
  const int32_t outputs = ceil_div(std::min(heads, most) * kernel.padded_dim, kMergeColumns);
  const int32_t step = kSplitsAhead * blocks;
  if ((shape.queries > 1 || (streams.values && outputs > 1)) && parts > step) {
    parts = parts / step * step;
  }
  // Of a row, whatever its length: the plan of a row must not depend on the capacity.
  const int32_t most_splits = ceil_div(parts, blocks);
  const int32_t part_bytes = streams.values ? std::min(heads, most) * kernel.padded_dim * 4 : 0;
  plan.merge = merge_rule(most_splits, heads / plan.head_blocks, part_bytes);
  fit(plan, chip);

  const int32_t tile = kernel.warp.keys * plan.warps / plan.team;
  const int32_t all_warps = kernel.warp.keys * plan.warps;
  const int32_t shortest = streams.listed ? std::max(all_warps, kShortestList) : all_warps;
  plan.rule = {parts, shortest, kNoLongest, tile};
  plan.max_splits = std::max(1, std::min(most_splits, ceil_div(shape.capacity, shortest)));
  if (plan.max_splits > 1) {
    const int64_t all = static_cast<int64_t>(shape.rows) * blocks * plan.max_splits;
    plan.part_stats = all * held * kPartStats;
    plan.part_out = streams.values ? all * held * kernel.padded_dim : 0;
  }
  return plan;
}

SelectPlan plan_select(const Chip& chip, int32_t candidates) {
  SelectPlan plan = {};
  plan.cluster = chip.clusters();
  plan.blocks = plan.cluster || candidates > kOneBlock ? kSelectBlocks : 1;
  const bool hands_over = !plan.cluster && plan.blocks > 1;
  if (hands_over) plan.histograms = plan.blocks * kSelectBins;
  // Without a cluster the last block ends up with the candidates of all.
  const int32_t per_block = ceil_div(std::max(candidates, 1), plan.cluster ? plan.blocks : 1);
  const int32_t most = (chip.shared_bytes - select_fixed_bytes()) / 8 / 4 * 4;
  plan.cached = std::min(round_up(per_block, 4), most);
  plan.shared_bytes = select_fixed_bytes() + plan.cached * 8;
  if (hands_over || per_block > most) plan.codes_stride = round_up(candidates, 8);
  return plan;
}

}  // namespace visionpulse::cuda
