// SPDX-License-Identifier: Apache-2.0
// Where things lie in the shared memory of a stream block: one answer for the plan, which asks for
// the memory, and for the kernel, which uses it.
//
//   q of each member's heads | their factors | warp 0: weights, copy barriers, logit indices | warp
//   1 | ... | team 0: stages of K and V | team 1 | ...
//
// A member is one warp of a team. Barriers and indices are used in the part of a team's first warp.
// When all tiles are done the stages hold what is merged:
//
//   the state of each warp's heads, [warp][head][kPartStats] | its sums of V, [warp][part][head][D]
//
// and, in a block that merges splits of a row, merge_floats() and two batches of their sums.
#pragma once

#include "kernels/cuda/args.h"

namespace visionpulse::cuda {

constexpr int32_t kCopyBarrierBytes = 16;

// Bytes from the start of shared memory, or from one part to the next.
struct SharedLayout {
  int32_t factors, warps, warp_pitch;
  int32_t barriers, indices;  // from the start of a warp's part
  int32_t stages, team_pitch;
  int32_t sums;
};

VP_HD SharedLayout shared_layout(const WarpTile& warp, int32_t warps, int32_t team, int32_t stages,
                                 int32_t stage_bytes) {
  SharedLayout at = {};
  at.barriers = warp.weight_bytes;
  at.indices = at.barriers + stages * kCopyBarrierBytes;
  at.warp_pitch = at.indices + stages * warp.keys * 4;
  at.factors = team * warp.query_bytes;
  at.warps = at.factors + team * warp.scale_bytes;
  at.stages = at.warps + warps * at.warp_pitch;
  at.team_pitch = stages * stage_bytes;
  at.sums = at.stages + warps * warp.heads * kPartStats * 4;
  return at;
}

// Parts of a row whose sums the merge copies and adds in one step. It takes whole steps of them.
constexpr int32_t kSplitsAhead = 8;
VP_HD int32_t padded_splits(int32_t splits) {
  return (splits + kSplitsAhead - 1) / kSplitsAhead * kSplitsAhead;
}
// Bytes of a step of all threads. Two batches of them lie behind what merge_floats() counts.
VP_HD int32_t merge_step_bytes(int32_t warps) {
  return kSplitsAhead * warps * kThreadsPerWarp * 16;
}

// Floats that the merge needs: the state of every part, [split][head][kPartStats], and behind it
// the largest logit that each warp saw of each head.
VP_HD int32_t merge_stats_floats(int32_t splits, int32_t heads) {
  return padded_splits(splits) * heads * kPartStats;
}
VP_HD int32_t merge_floats(int32_t splits, int32_t heads) {
  return merge_stats_floats(splits, heads) + kMaxWarps * heads;
}

}  // namespace visionpulse::cuda
