// SPDX-License-Identifier: Apache-2.0
// The candidates of a row that one warp selects from: their positions, and the sort codes of their
// scores.
#pragma once

#include "kernels/common/sort_codes.h"
#include "kernels/cuda/args.h"
#include "kernels/cuda/spans.cuh"

namespace visionpulse::cuda {

constexpr int kAhead = 4;  // candidates of a lane whose scores are in flight at once

// Stands for a candidate without a key. No score has this sort code: NaN has 0, -inf 0x7fffff.
constexpr uint32_t kNoCode = 1;

// Candidates are numbered from the first visible one of the row. A warp takes its own in order,
// kAhead times 32 a step: a lane has candidates i, i + 32 and so on.
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
    cursor = cursor.before(spans);
    if (begin < limit) cursor.seek(first + begin);
  }

  // Positions of a lane's candidates of one step, whose first has visual index `index`; -1 past the
  // end of the warp's.
  __device__ __forceinline__ void locate(SpanCursor<Order::kVisual>& at, int32_t index,
                                         int32_t (&position)[kAhead]) const {
    const int32_t end = first + limit, reach = index + kStep - kThreadsPerWarp;
    const bool within = (reach < end ? reach : end - 1) < at.next;
    if (!__any_sync(kAllLanes, !within)) {  // most often: all in one span
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t own = index + u * kThreadsPerWarp;
        position[u] = own < end ? at.position_of(own) : -1;
      }
      return;
    }
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      const int32_t own = index + u * kThreadsPerWarp;
      at.advance(own < end ? own : -1);
      position[u] = own < end ? at.position_of(own) : -1;
    }
  }

  // `visit(i, positions)` for each step, by all lanes.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    SpanCursor<Order::kVisual> at = cursor;
    VP_UNROLL_1 for (int32_t step = begin; step < limit; step += kStep) {
      const int32_t i = step + lane_id();
      int32_t position[kAhead];
      locate(at, first + i, position);
      visit(i, position);
    }
  }

  // The sort codes of the candidates at these positions.
  __device__ __forceinline__ void read_codes(int32_t i, const int32_t (&position)[kAhead],
                                             uint32_t (&code)[kAhead]) const {
    int32_t index[kAhead];
    float score[kAhead];
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      index[u] = position[u] < 0    ? 0
                 : args.by_position ? position[u]
                                    : first + i + u * kThreadsPerWarp;
      score[u] = scores[index[u]];
    }
    if (args.parts > 1 || args.weight != 1.0f) add_parts(index, score);
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      code[u] = position[u] < 0 ? kNoCode : sort_code(score[u]);
    }
    if (args.kv.table == nullptr) return;
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      if (position[u] >= 0 && !has_key(args.kv, b, position[u])) code[u] = kNoCode;
    }
  }

  __device__ __forceinline__ void add_parts(const int32_t (&index)[kAhead],
                                            float (&score)[kAhead]) const {
    const float* part = scores;
#pragma unroll 2
    for (int32_t p = 1; p < args.parts; ++p) {
      part += args.part_stride;
      VP_UNROLL for (int u = 0; u < kAhead; ++u) score[u] += part[index[u]];
    }
    VP_UNROLL for (int u = 0; u < kAhead; ++u) score[u] *= args.weight;
  }
};

}  // namespace visionpulse::cuda
