// SPDX-License-Identifier: Apache-2.0
// One pass over K: logits left behind, softmax sums at 1 and at tau, and with V the dense output.
// Then, for the probabilities, one pass over the logits in parallel chunks.
#include "kernels/common/budget.h"
#include "kernels/cuda/entries.cuh"
#include "kernels/cuda/stream.cuh"

namespace visionpulse::cuda {

#define VP_ENTRY(dtype, type, d, r)     \
  VP_KERNEL(kMaxWarps* kThreadsPerWarp) \
  vp_score_##dtype##_d##d##_r##r(VP_ARGS(StreamArgs) args) { stream<type, d, r, true>(args); }
VP_STREAM_KERNELS(VP_ENTRY)
#undef VP_ENTRY

const StreamKernel* score_kernel(DType dtype, int32_t head_dim, int32_t row_tile) {
#define VP_ENTRY(dtype_name, type, d, r)                                                          \
  if (dtype == kDType_##dtype_name && head_dim == d && row_tile == r) {                           \
    static const StreamKernel kernel =                                                            \
        describe<type, d, r>(reinterpret_cast<const void*>(&vp_score_##dtype_name##_d##d##_r##r), \
                             "vp_score_" #dtype_name "_d" #d "_r" #r);                            \
    return &kernel;                                                                               \
  }
  VP_STREAM_KERNELS(VP_ENTRY)
#undef VP_ENTRY
  return nullptr;
}

// What a position scores, from the logits of its heads.
VP_DEVICE float rank_of(const RankArgs& args, const float* log2_sums, int32_t b, int32_t position) {
  float sum = 0.0f;
  if (args.kind == ScoreKind::kLogit) {
    const int64_t first = static_cast<int64_t>(b) * args.head_blocks;
    for (int32_t part = 0; part < args.head_blocks; ++part) {
      sum += args.sums[(first + part) * args.logits_row + position];
    }
  } else {
    const int64_t first = static_cast<int64_t>(b) * args.heads;
    const float by = args.kind == ScoreKind::kProb ? 1.0f : args.inverse_tau;
#pragma unroll 4
    for (int32_t h = 0; h < args.heads; ++h) {
      const float z = args.logits[(first + h) * args.logits_row + position] * kLog2e;
      // in this order also in the tail: equal logits give equal bits
      sum += precise_exp2(fmaf(z, by, -log2_sums[h]));
    }
  }
  return sum * (1.0f / static_cast<float>(args.heads));
}

// A block per 256 positions of a row: scores where there are candidates, -inf elsewhere.
VP_DEVICE void rank(const RankArgs& args) {
  VP_SHARED(shared);
  wait_for_previous();
  const int32_t b = blockIdx.y;
  auto* log2_sums = reinterpret_cast<float*>(shared);  // [H]
  const float* stats = args.stats + static_cast<int64_t>(b) * args.heads * kHeadStats;
  float* masses = log2_sums + args.heads;  // [H]
  for (int32_t h = threadIdx.x; h < args.heads; h += blockDim.x) {
    log2_sums[h] = stats[h * kHeadStats + (args.kind == ScoreKind::kProbTau ? 1 : 0)];
    masses[h] = stats[h * kHeadStats + 2];
  }
  __syncthreads();
  if (args.mass && blockIdx.x == 0 && threadIdx.x == 0) {
    const Masses of = masses_of_heads(masses, args.heads);
    args.mass[b] = of.max;
    args.mass_mean[b] = of.mean;
  }
  const int32_t warp_first =
      (blockIdx.x * blockDim.x + threadIdx.x) / kThreadsPerWarp * kThreadsPerWarp;
  const int32_t position = warp_first + threadIdx.x % kThreadsPerWarp;
  SpanCursor<Order::kPosition> cursor{Spans::of(args.visual, b), 0, 0, 0};
  cursor.seek(warp_first);
  cursor.advance(position);
  if (position >= args.capacity) return;
  const Range keys = row_range(args.starts, args.lengths, args.capacity, args.window, b);
  const bool candidate = position >= keys.begin && position < keys.end && position < cursor.held;
  args.scores[b * args.scores_row + position] =
      candidate ? rank_of(args, log2_sums, b, position) : minus_infinity();
  let_next_start();
}

VP_KERNEL(kRankThreads) vp_rank(VP_ARGS(RankArgs) args) { rank(args); }

const void* rank_kernel() { return reinterpret_cast<const void*>(&vp_rank); }

}  // namespace visionpulse::cuda
