// SPDX-License-Identifier: Apache-2.0
// The visible range of a row, its pages, and its spans of visual tokens.
#pragma once

#include "kernels/common/visible_range.h"
#include "kernels/common/visual_spans.h"
#include "kernels/cuda/args.h"
#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

VP_DEVICE Range row_range(const CacheArgs& kv, int32_t window, int32_t b) {
  return visible_range(kv.starts ? kv.starts[b] : 0, kv.lengths ? kv.lengths[b] : kv.capacity,
                       kv.capacity, window);
}

// The page that holds a position; -1 where its id is outside the pool, so there is no key.
VP_DEVICE int32_t page_of(const CacheArgs& kv, int32_t b, int32_t position) {
  const int32_t page = kv.table[b * kv.table_stride + position / kv.page_size];
  return page >= 0 && page < kv.pages ? page : -1;
}
VP_DEVICE bool has_key(const CacheArgs& kv, int32_t b, int32_t position) {
  return kv.table == nullptr || page_of(kv, b, position) >= 0;
}

// The spans of one row.
struct Spans {
  const int32_t* spans;    // [S, 2]
  const int32_t* offsets;  // [S + 1]
  int32_t count;           // S

  VP_DEVICE Spans of(const VisualArgs& visual, int32_t b) {
    const int64_t s = visual.spans_per_row;
    return {visual.spans + b * s * 2, visual.offsets + b * (s + 1), visual.spans_per_row};
  }
};

// What an index into a row counts: all its positions, its text, or its visual tokens.
enum class Order { kPosition, kText, kVisual };

// Follows the ascending indices of one lane through the spans.
template <Order kOrder>
struct SpanCursor {
  Spans row;
  int32_t span;  // the last one that begins at or before the index; -1: none
  int32_t next;  // the index where the following one begins
  int32_t held;  // kPosition: the end of the span; else: position minus index

  __device__ __forceinline__ int32_t begin_of(int32_t s) const {
    if (kOrder == Order::kVisual) return row.offsets[s];
    return kOrder == Order::kText ? row.spans[2 * s] - row.offsets[s] : row.spans[2 * s];
  }
  __device__ __forceinline__ void enter(int32_t s) {
    span = s;
    next = s + 1 < row.count ? begin_of(s + 1) : kNoSpan;
    if (s < 0) {
      held = 0;
    } else if (kOrder == Order::kVisual) {
      held = row.spans[2 * s] - row.offsets[s];
    } else {
      held = kOrder == Order::kText ? row.offsets[s + 1] : row.spans[2 * s + 1];
    }
  }
  // The whole warp looks for one index, with 32 probes a step: each step is a trip to memory.
  __device__ __forceinline__ void seek(int32_t index) {
    const int32_t lane = lane_id();
    int32_t first = 0, size = row.count;
    while (size > 0) {
      const int32_t step = (size + kThreadsPerWarp - 1) / kThreadsPerWarp;
      const int32_t probe = (lane + 1) * step - 1;
      const bool before = probe < size && begin_of(first + probe) <= index;
      const int32_t whole = __popc(__ballot_sync(kAllLanes, before));
      const int32_t left = size - whole * step;
      first += whole * step;
      size = left >= step ? step - 1 : left;
    }
    enter(first - 1);
  }
  __device__ __forceinline__ void advance(int32_t index) {
    while (next <= index) enter(span + 1);
  }
  // Whether a position that was advanced to lies in the span; for kPosition.
  __device__ __forceinline__ bool covers(int32_t position) const { return position < held; }
  // For kText and kVisual.
  __device__ __forceinline__ int32_t position_of(int32_t index) const { return index + held; }
  // The visual index of a position inside the span.
  __device__ __forceinline__ int32_t visual_index(int32_t position) const {
    return row.offsets[span] + (position - row.spans[2 * span]);
  }
};

// Visual tokens before a position; called by whole warps.
VP_DEVICE int32_t visual_before(const Spans& row, int32_t position) {
  SpanCursor<Order::kPosition> cursor{row, 0, 0, 0};
  cursor.seek(position - 1);
  if (cursor.span < 0) return 0;
  const int32_t begin = row.spans[2 * cursor.span];
  const int32_t end = position < cursor.held ? position : cursor.held;
  return row.offsets[cursor.span] + end - begin;
}

VP_DEVICE bool is_visual(const Spans& row, int32_t position) {
  const int32_t s = span_after(row.spans, row.count, position);
  return s < row.count && row.spans[2 * s] <= position;
}

}  // namespace visionpulse::cuda
