// SPDX-License-Identifier: Apache-2.0
// One pass over K: logits left behind, softmax sums at 1 and at tau, and with V the dense output.
// Then, for the probabilities, one pass over the logits in parallel chunks.
#include "kernels/common/budget.h"
#include "kernels/cuda/entries.cuh"
#include "kernels/cuda/stream.cuh"

namespace visionpulse::cuda {

#define VP_ENTRY(dtype, type, d, r)                       \
  VP_KERNEL(kMaxWarps* kThreadsPerWarp, kResidentStreams) \
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

// What a candidate scores, from the logits of its heads at `place`.
VP_DEVICE float rank_of(const RankArgs& args, const float* log2_sums, int32_t b, int32_t place) {
  float sum = 0.0f;
  if (args.kind == ScoreKind::kLogit) {
    const int64_t first = static_cast<int64_t>(b) * args.sum_parts;
    for (int32_t part = 0; part < args.sum_parts; ++part) {
      sum += args.sums[(first + part) * args.logits_row + place];
    }
  } else {
    const int64_t first = static_cast<int64_t>(b) * args.heads;
    const float by = args.kind == ScoreKind::kProb ? 1.0f : args.inverse_tau;
#pragma unroll 4
    for (int32_t h = 0; h < args.heads; ++h) {
      const float z = args.logits[(first + h) * args.logits_row + place] * kLog2e;
      // in this order also in the tail: equal logits give equal bits
      sum += precise_exp2(fmaf(z, by, -log2_sums[h]));
    }
  }
  return sum * (1.0f / static_cast<float>(args.heads));
}

// A thread's score by position: -inf where there is no candidate.
VP_DEVICE void rank_position(const RankArgs& args, const float* log2_sums, int32_t b,
                             int32_t warp_first, int32_t position) {
  SpanCursor<Order::kPosition> cursor{Spans::of(args.visual, b), 0, 0, 0};
  cursor.seek(warp_first);
  cursor.advance(position);
  if (position >= args.kv.capacity) return;
  const Range keys = row_range(args.kv, args.window, b);
  const bool candidate = position >= keys.begin && position < keys.end && position < cursor.held &&
                         has_key(args.kv, b, position);
  float score = minus_infinity();
  if (candidate) {
    const int32_t place = args.logits_by_position ? position : cursor.visual_index(position);
    score = rank_of(args, log2_sums, b, place);
  }
  args.scores[b * args.scores_row + position] = score;
}

// A thread's score by visual index; only those of keys that the step may see are ever read.
VP_DEVICE void rank_visual(const RankArgs& args, const float* log2_sums, int32_t b,
                           int32_t warp_first, int32_t index) {
  const Spans spans = Spans::of(args.visual, b);
  const Range keys = row_range(args.kv, args.window, b);
  const int32_t begin = visual_before(spans, keys.begin), end = visual_before(spans, keys.end);
  if (warp_first + kThreadsPerWarp <= begin || warp_first >= end) return;
  SpanCursor<Order::kVisual> cursor{spans, 0, 0, 0};
  cursor.seek(warp_first);
  if (index < begin || index >= end) return;
  cursor.advance(index);
  const int32_t position = index + cursor.held;
  if (!has_key(args.kv, b, position)) return;
  args.scores[b * args.scores_row + index] =
      rank_of(args, log2_sums, b, args.logits_by_position ? position : index);
}

// A block per 256 scores of a row.
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
  const int32_t at = blockIdx.x * blockDim.x + threadIdx.x;
  const int32_t warp_first = at / kThreadsPerWarp * kThreadsPerWarp;
  if (args.scores_by_position) {
    rank_position(args, log2_sums, b, warp_first, at);
  } else {
    rank_visual(args, log2_sums, b, warp_first, at);
  }
  let_next_start();
}

VP_KERNEL(kRankThreads, 4) vp_rank(VP_ARGS(RankArgs) args) { rank(args); }

const void* rank_kernel() { return reinterpret_cast<const void*>(&vp_rank); }

}  // namespace visionpulse::cuda
