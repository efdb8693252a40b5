// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace visionpulse::cuda {

namespace {

constexpr int32_t kHeadDims[] = {64, 80, 96, 128, 192, 256};
constexpr int32_t kMostStages = 6;     // more are not told apart by the wait
constexpr int32_t kEnoughStages = 3;   // hide a trip to memory behind two tiles
constexpr int32_t kMostSplits = 128;   // what one block joins in about the time of a tile
constexpr int32_t kBlocksPerChip = 2;  // per multiprocessor, of one row
constexpr int32_t kOneBlock = 4 * kSelectThreads;  // candidates that a block reads in one go
constexpr int32_t kReserved = 1024;  // shared memory that each resident block costs beside its own

int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }
int32_t round_up(int32_t a, int32_t b) { return ceil_div(a, b) * b; }

// The least row tile that there is for a group of query heads.
int32_t row_tile(DType dtype, int32_t group) {
  const int32_t least = dtype == DType::kFloat32 ? 4 : 8;
  return group <= least ? least : 32;
}

// Warps that hold a group together; the kernels count in powers of two.
int32_t team_of(const StreamKernel& kernel, int32_t group) {
  int32_t team = 1;
  while (team * kernel.warp_rows < group) team *= 2;
  return team;
}

struct Memory {
  int32_t fixed;      // q
  int32_t per_warp;   // beside the stages
  int32_t per_stage;  // and team
  int32_t reduce;     // per warp, in the place of the stages
  int32_t merge;      // in the place of the stages

  int32_t total(int32_t warps, int32_t team, int32_t stages, int32_t keys) const {
    const int32_t own = warps * (per_warp + stages * stage_extra_bytes(keys));
    return fixed + own + std::max({warps / team * stages * per_stage, warps * reduce, merge});
  }
};

// Four warps with enough stages so that two blocks share a multiprocessor; then one block; then
// fewer warps.
void fit(StreamPlan& plan, const Memory& memory, const Chip& chip) {
  const int32_t keys = plan.kernel->keys;
  const int32_t half = (chip.shared_bytes + kReserved) / 2 - kReserved;
  for (const int32_t limit : {half, chip.shared_bytes}) {
    for (const int32_t warps : {4, 2, 1}) {
      if (warps < plan.team || (warps < 4 && limit == half)) break;
      for (int32_t stages = kMostStages; stages >= 2; --stages) {
        if (stages < kEnoughStages && (limit == half || warps > plan.team)) break;
        const int32_t bytes = memory.total(warps, plan.team, stages, keys);
        if (bytes > limit) continue;
        plan.warps = warps;
        plan.stages = stages;
        plan.shared_bytes = bytes;
        return;
      }
    }
  }
  throw std::invalid_argument(std::string(plan.kernel->name) + " needs more than the " +
                              std::to_string(chip.shared_bytes) +
                              " bytes of shared memory of a block on this GPU");
}

}  // namespace

// By default on the chips with HBM: sm_120 was seen to bring tiles from L2 faster without it.
bool bulk_copies(const Chip& chip, Copies wish) {
  const bool able = chip.bulk_copies();
  if (wish == Copies::kBulk && !able) {
    const auto version = [](int32_t of) {
      return std::to_string(of / 10) + "." + std::to_string(of % 10);
    };
    throw std::invalid_argument("bulk copies need compute capability 9.0, this GPU has " +
                                version(chip.capability) + " and runs kernels built for " +
                                version(chip.code) + "; ask for auto or async");
  }
  return wish == Copies::kAuto ? able && chip.capability < 120 : wish == Copies::kBulk;
}

int32_t padded_head_dim(int32_t head_dim) {
  for (const int32_t d : kHeadDims) {
    if (head_dim <= d) return d;
  }
  return 0;
}

StreamPlan plan_stream(Stage stage, const Chip& chip, const Shape& shape, Streams streams) {
  StreamPlan plan = {};
  const int32_t group = shape.heads / shape.kv_heads;
  const int32_t rows = row_tile(shape.dtype, group);
  const int32_t dim = padded_head_dim(shape.head_dim);
  plan.kernel = stage == Stage::kScore ? score_kernel(shape.dtype, dim, rows)
                                       : attend_kernel(shape.dtype, dim, rows);
  if (plan.kernel == nullptr || group > rows) {
    throw std::invalid_argument("no kernel for head dim " + std::to_string(shape.head_dim) +
                                " and " + std::to_string(group) + " query heads per KV head");
  }
  const StreamKernel& kernel = *plan.kernel;
  plan.team = team_of(kernel, group);
  const int32_t held = plan.team * kernel.warp_rows;  // query heads, padded
  plan.k_bytes = streams.keys ? kernel.tile_bytes : held * kernel.keys * 4;
  plan.v_bytes = streams.values ? kernel.tile_bytes : 0;

  const int32_t blocks = shape.kv_heads;
  // The parts of one row fill the chip alone, so that its bits do not depend on the batch.
  const int32_t wanted =
      std::min(std::max(kBlocksPerChip * chip.multiprocessors, blocks), kMostSplits * blocks);
  const int32_t part_stats = held * kPartStats;
  Memory memory = {};
  memory.fixed = plan.team * kernel.query_bytes;
  memory.per_warp = kernel.warp_bytes;
  memory.per_stage = plan.k_bytes + plan.v_bytes;
  memory.reduce = streams.values ? kernel.reduce_bytes : kernel.warp_rows * kPartStats * 4;
  // Whatever the row: the plan of a row must not depend on the capacity.
  memory.merge = (ceil_div(wanted, blocks) * part_stats + held) * 4;
  fit(plan, memory, chip);

  const int32_t tile = kernel.keys * plan.warps / plan.team, shortest = kernel.keys * plan.warps;
  plan.rule = {wanted, shortest, 1 << 30, tile};
  plan.max_splits =
      std::max(1, std::min(ceil_div(wanted, blocks), ceil_div(shape.capacity, shortest)));
  if (plan.max_splits > 1) {
    const int64_t parts = static_cast<int64_t>(shape.rows) * blocks * plan.max_splits;
    plan.part_stats = parts * part_stats;
    plan.part_out = streams.values ? parts * held * kernel.padded_dim : 0;
  }
  return plan;
}

SelectPlan plan_select(const Chip& chip, int32_t candidates) {
  SelectPlan plan = {};
  plan.cluster = chip.clusters();
  plan.blocks = plan.cluster || candidates > kOneBlock ? kSelectBlocks : 1;
  const bool hands_over = !plan.cluster && plan.blocks > 1;
  if (hands_over) plan.bins = plan.blocks * kSelectBins;
  // Without a cluster the last block ends up with the keys of all.
  const int32_t per_block = ceil_div(std::max(candidates, 1), plan.cluster ? plan.blocks : 1);
  const int32_t room = (chip.shared_bytes - select_fixed_bytes()) / 8 / 4 * 4;
  plan.cached = std::min(round_up(per_block, 4), room);
  plan.shared_bytes = select_fixed_bytes() + plan.cached * 8;
  if (hands_over || per_block > room) plan.keys_row = round_up(candidates, 8);
  return plan;
}

}  // namespace visionpulse::cuda
