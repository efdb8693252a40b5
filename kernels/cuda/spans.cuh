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

// What an index into a row counts: all its positions, its text, or its visual tokens.
enum class Order { kPosition, kText, kVisual };

struct Span {
  int32_t begin, end;  // positions
  int32_t before;      // visual tokens of the row before it
};

// The spans of one row, for whole warps. Where a warp has a lane for each of them they are held in
// registers: a search is then a vote, and no trip to memory.
struct Spans {
  const int32_t* spans;    // [S, 2]
  const int32_t* offsets;  // [S + 1]
  int32_t count;           // S
  Span own;                // of this lane, where they are held

  VP_DEVICE Spans of(const VisualArgs& visual, int32_t b) {
    const int64_t s = visual.spans_per_row;
    Spans row = {visual.spans + b * s * 2,
                 visual.offsets + b * (s + 1),
                 visual.spans_per_row,
                 {kNoSpan, kNoSpan, 0}};
    const int32_t lane = lane_id();
    if (row.held() && lane < row.count) {
      row.own = {row.spans[2 * lane], row.spans[2 * lane + 1], row.offsets[lane]};
    }
    return row;
  }

  __device__ __forceinline__ bool held() const { return count <= kThreadsPerWarp; }

  // Span s of each lane; without an end or a begin where there is none.
  template <bool kHeld>
  __device__ __forceinline__ Span at(int32_t s) const {
    if (kHeld) {
      const int32_t lane = s & (kThreadsPerWarp - 1);
      const Span of = {__shfl_sync(kAllLanes, own.begin, lane),
                       __shfl_sync(kAllLanes, own.end, lane),
                       __shfl_sync(kAllLanes, own.before, lane)};
      if (s >= 0 && s < count) return of;
    } else if (s >= 0 && s < count) {
      return {spans[2 * s], spans[2 * s + 1], offsets[s]};
    }
    return {kNoSpan, kNoSpan, 0};
  }
  __device__ __forceinline__ Span at(int32_t s) const {
    return held() ? at<true>(s) : at<false>(s);
  }

  template <Order kOrder>
  VP_DEVICE int32_t begin_of(const Span& span) {
    if (kOrder == Order::kVisual) return span.before;
    return kOrder == Order::kText ? span.begin - span.before : span.begin;
  }
  // The last span that begins at or before one index; -1: none.
  template <Order kOrder>
  __device__ __forceinline__ int32_t last_at(int32_t index) const {
    const int32_t lane = lane_id();
    if (held()) {
      const bool before = lane < count && begin_of<kOrder>(own) <= index;
      return __popc(__ballot_sync(kAllLanes, before)) - 1;
    }
    // 32 probes a step: each step is a trip to memory
    int32_t first = 0, size = count;
    while (size > 0) {
      const int32_t step = (size + kThreadsPerWarp - 1) / kThreadsPerWarp;
      const int32_t probe = (lane + 1) * step - 1;
      const bool before = probe < size && begin_of<kOrder>(at<false>(first + probe)) <= index;
      const int32_t whole = __popc(__ballot_sync(kAllLanes, before));
      const int32_t left = size - whole * step;
      first += whole * step;
      size = left >= step ? step - 1 : left;
    }
    return first - 1;
  }
};

// Follows the ascending indices of each lane of a warp through the spans. All lanes call together;
// one that has no index passes -1.
template <Order kOrder>
struct SpanCursor {
  Spans row;
  int32_t span;  // the last one that begins at or before the index; -1: none
  int32_t next;  // the index where the following one begins
  int32_t held;  // kPosition: the end of the span; else: position minus index

  VP_DEVICE SpanCursor before(const Spans& row) { return {row, -1, kNoSpan, 0}; }

  template <bool kHeld>
  __device__ __forceinline__ void enter(int32_t s) {
    const Span of = row.at<kHeld>(s), after = row.at<kHeld>(s + 1);
    span = s;
    next = s + 1 < row.count ? Spans::begin_of<kOrder>(after) : kNoSpan;
    if (s < 0) {
      held = 0;
    } else if (kOrder == Order::kVisual) {
      held = of.begin - of.before;
    } else {
      held = kOrder == Order::kText ? of.before + (of.end - of.begin) : of.end;
    }
  }
  // The same index for all lanes.
  __device__ __forceinline__ void seek(int32_t index) {
    const int32_t s = row.last_at<kOrder>(index);
    row.held() ? enter<true>(s) : enter<false>(s);
  }
  __device__ __forceinline__ void advance(int32_t index) {
    if (row.held()) {
      while (__any_sync(kAllLanes, next <= index)) enter<true>(next <= index ? span + 1 : span);
    } else {
      while (next <= index) enter<false>(span + 1);
    }
  }
  // Whether a position that was advanced to lies in the span; for kPosition.
  __device__ __forceinline__ bool covers(int32_t position) const { return position < held; }
  // For kText and kVisual.
  __device__ __forceinline__ int32_t position_of(int32_t index) const { return index + held; }
  // The visual index of a position inside the span.
  __device__ __forceinline__ int32_t visual_index(int32_t position) const {
    const Span of = row.at(span);
    return of.before + (position - of.begin);
  }
};

// Visual tokens before one position.
VP_DEVICE int32_t visual_before(const Spans& row, int32_t position) {
  if (position == 0) return 0;  // most often, and worth a search
  const int32_t s = row.last_at<Order::kPosition>(position - 1);
  const Span of = row.at(s);
  if (s < 0) return 0;
  return of.before + (position < of.end ? position : of.end) - of.begin;
}

VP_DEVICE bool is_visual(const Spans& row, int32_t position) {
  const int32_t s = span_after(row.spans, row.count, position);
  return s < row.count && row.spans[2 * s] <= position;
}

}  // namespace visionpulse::cuda
