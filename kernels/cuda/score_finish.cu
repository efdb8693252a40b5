// SPDX-License-Identifier: Apache-2.0
// The second kernel of the score stage: it turns the logits that score.cu stored into scores.
#include "kernels/common/softmax.h"
#include "kernels/cuda/masses.cuh"
#include "kernels/cuda/spans.cuh"

namespace visionpulse::cuda {

// The score of the candidate whose logits lie at `logit_index`.
VP_DEVICE float score_of(const ScoreFinishArgs& args, const float* log2_sums, int32_t b,
                         int32_t logit_index) {
  float sum = 0.0f;
  if (args.kind == ScoreKind::kLogit) {
    const int64_t first = static_cast<int64_t>(b) * args.sum_parts;
    for (int32_t part = 0; part < args.sum_parts; ++part) {
      sum += args.sums[(first + part) * args.logits_stride + logit_index];
    }
  } else {
    const int64_t first = static_cast<int64_t>(b) * args.heads;
    const float by = args.kind == ScoreKind::kProb ? 1.0f : args.inverse_tau;
#pragma unroll 16
    for (int32_t h = 0; h < args.heads; ++h) {
      const float z = args.logits[(first + h) * args.logits_stride + logit_index] * kLog2e;
      // The same order of operations in the unrolled loop and its tail: equal logits give equal
      // bits.
      sum += precise_exp2(fmaf(z, by, -log2_sums[h]));
    }
  }
  return sum * (1.0f / static_cast<float>(args.heads));
}

// One thread's score by position: -inf where there is no candidate.
VP_DEVICE void score_position(const ScoreFinishArgs& args, const float* log2_sums, int32_t b,
                              const Spans& spans, const Range& keys, int32_t warp_first,
                              int32_t position) {
  auto cursor = SpanCursor<Order::kPosition>::before(spans);
  cursor.seek(warp_first);
  cursor.advance(position);
  const int32_t visual_index = cursor.visual_index(position);
  if (position >= args.kv.capacity) return;
  const bool candidate = position >= keys.begin && position < keys.end && cursor.covers(position) &&
                         has_key(args.kv, b, position);
  float score = minus_infinity();
  if (candidate) {
    const int32_t index = args.logits_by_position ? position : visual_index;
    score = score_of(args, log2_sums, b, index);
  }
  args.scores[b * args.scores_stride + position] = score;
}

// One thread's score by visual index. Only the scores of visible keys are written, and ever read.
VP_DEVICE void score_visual_index(const ScoreFinishArgs& args, const float* log2_sums, int32_t b,
                                  const Spans& spans, const Range& keys, int32_t warp_first,
                                  int32_t index) {
  const int32_t begin = visual_before(spans, keys.begin), end = visual_before(spans, keys.end);
  if (warp_first + kThreadsPerWarp <= begin || warp_first >= end) return;
  auto cursor = SpanCursor<Order::kVisual>::before(spans);
  cursor.seek(warp_first);
  const bool inside = index >= begin && index < end;
  cursor.advance(inside ? index : -1);
  if (!inside) return;
  const int32_t position = cursor.position_of(index);
  if (!has_key(args.kv, b, position)) return;
  args.scores[b * args.scores_stride + index] =
      score_of(args, log2_sums, b, args.logits_by_position ? position : index);
}

// A block for each 256 scores of a row.
VP_DEVICE void score_finish(const ScoreFinishArgs& args) {
  VP_SHARED(shared);
  wait_for_previous();
  const int32_t b = blockIdx.y;
  auto* log2_sums = reinterpret_cast<float*>(shared);  // [H]
  const float* stats = args.stats + static_cast<int64_t>(b) * args.heads * kHeadStats;
  // asked for together, before any of it is used
  const Range keys = row_range(args.kv, args.window, b);
  const Spans spans = Spans::of(args.visual, b);
  const HeadMasses masses(args.mass ? args.stats : nullptr, b, args.heads);
  for (int32_t h = threadIdx.x; h < args.heads; h += blockDim.x) {
    log2_sums[h] = stats[h * kHeadStats + (args.kind == ScoreKind::kProbTau ? 1 : 0)];
  }
  __syncthreads();
  const int32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  const int32_t warp_first = index / kThreadsPerWarp * kThreadsPerWarp;
  if (args.scores_by_position) {
    score_position(args, log2_sums, b, spans, keys, warp_first, index);
  } else {
    score_visual_index(args, log2_sums, b, spans, keys, warp_first, index);
  }
  if (args.mass && blockIdx.x == 0 && threadIdx.x < kThreadsPerWarp) {
    const float max = masses.max(), mean = masses.mean();
    if (threadIdx.x == 0) args.mass[b] = max, args.mass_mean[b] = mean;
  }
  let_next_start();
}

VP_KERNEL(kScoreFinishThreads, 4) vp_score_finish(VP_ARGS(ScoreFinishArgs) args) {
  score_finish(args);
}

const void* score_finish_kernel() { return reinterpret_cast<const void*>(&vp_score_finish); }

}  // namespace visionpulse::cuda
