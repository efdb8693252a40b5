// SPDX-License-Identifier: Apache-2.0
// The candidates of a row that one warp chooses from: where they are, and the keys of their scores.
#pragma once

#include "kernels/common/sort_codes.h"
#include "kernels/cuda/args.h"
#include "kernels/cuda/row.cuh"

namespace visionpulse::cuda {

constexpr int kAhead = 4;  // candidates of a lane that are on their way from memory at once

// What stands for a candidate without a key; no score has it, NaN has 0 and -inf 0x7fffff.
constexpr uint32_t kNoKey = 1;

// Candidates are counted from the first visible one of the row. A warp passes its own in order,
// kAhead times 32 a step, of which a lane has `i`, i + 32 and so on.
struct Candidates {
  static constexpr int32_t kStep = kAhead * kThreadsPerWarp;

  const SelectArgs& args;
  const float* scores;  // of the row
  int32_t b;
  int32_t first;         // visual index of candidate 0
  int32_t begin, limit;  // of this warp
  SpanCursor<Order::kVisual> cursor;

  __device__ __forceinline__ void take(const Spans& spans, int32_t from, int32_t to) {
    begin = from, limit = to;
    cursor = {spans, 0, 0, 0};
    if (begin < limit) cursor.seek(first + begin);
  }

  // Positions of a lane's candidates of one step, the first of visual index `index`; -1 past the
  // warp's end.
  __device__ __forceinline__ void locate(SpanCursor<Order::kVisual>& at, int32_t index,
                                         int32_t (&position)[kAhead]) const {
    const int32_t end = first + limit, reach = index + kStep - kThreadsPerWarp;
    if ((reach < end ? reach : end - 1) < at.next) {  // most often: all in one run
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t place = index + u * kThreadsPerWarp;
        position[u] = place < end ? place + at.held : -1;
      }
      return;
    }
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      const int32_t place = index + u * kThreadsPerWarp;
      position[u] = -1;
      if (place < end) {
        at.advance(place);
        position[u] = place + at.held;
      }
    }
  }

  // `visit(i, positions)` for each step, by all lanes.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    SpanCursor<Order::kVisual> at = cursor;
    VP_UNROLL_1 for (int32_t step = begin; step < limit; step += kStep) {
      const int32_t i = step + threadIdx.x % kThreadsPerWarp;
      int32_t position[kAhead];
      locate(at, first + i, position);
      visit(i, position);
    }
  }

  // Keys of the scores of candidates that lie at these positions.
  __device__ __forceinline__ void read_scores(int32_t i, const int32_t (&position)[kAhead],
                                              uint32_t (&key)[kAhead]) const {
    int32_t place[kAhead];
    float score[kAhead];
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      place[u] = position[u] < 0    ? 0
                 : args.by_position ? position[u]
                                    : first + i + u * kThreadsPerWarp;
      score[u] = scores[place[u]];
    }
    if (args.parts > 1 || args.weight != 1.0f) add_parts(place, score);
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      key[u] = position[u] < 0 ? kNoKey : sort_code(score[u]);
    }
    if (args.kv.table == nullptr) return;
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      if (position[u] >= 0 && !has_key(args.kv, b, position[u])) key[u] = kNoKey;
    }
  }

  __device__ __forceinline__ void add_parts(const int32_t (&place)[kAhead],
                                            float (&score)[kAhead]) const {
    const float* part = scores;
#pragma unroll 2
    for (int32_t p = 1; p < args.parts; ++p) {
      part += args.scores_part;
      VP_UNROLL for (int u = 0; u < kAhead; ++u) score[u] += part[place[u]];
    }
    VP_UNROLL for (int u = 0; u < kAhead; ++u) score[u] *= args.weight;
  }
};

}  // namespace visionpulse::cuda
