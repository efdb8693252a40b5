// SPDX-License-Identifier: Apache-2.0
// Where the keys of a row are: its visible range, its runs of visual tokens, its pages, and the
// virtual order (text first, then the list) in which a follower meets them.
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

// The page that holds a position; -1 where its id is not in the pool, and so no key is there.
VP_DEVICE int32_t page_of(const CacheArgs& kv, int32_t b, int32_t position) {
  const int32_t page = kv.table[b * kv.table_stride + position / kv.page_size];
  return page >= 0 && page < kv.pages ? page : -1;
}
VP_DEVICE bool has_key(const CacheArgs& kv, int32_t b, int32_t position) {
  return kv.table == nullptr || page_of(kv, b, position) >= 0;
}

// The runs of one row.
struct Spans {
  const int32_t* spans;    // [S, 2]
  const int32_t* offsets;  // [S + 1]
  int32_t count;           // S

  VP_DEVICE Spans of(const VisualArgs& visual, int32_t b) {
    const int64_t s = visual.spans_per_row;
    return {visual.spans + b * s * 2, visual.offsets + b * (s + 1), visual.spans_per_row};
  }
};

// How a place in a row is counted: over all positions, over its text, or over its visual tokens.
enum class Order { kPosition, kText, kVisual };

// Follows one lane's ascending places through the runs.
template <Order kOrder>
struct SpanCursor {
  Spans row;
  int32_t run;   // the last one that begins at or before the place; -1: none
  int32_t next;  // the place where the following one begins
  int32_t held;  // kPosition: the run's end; else: what to add to a place for its position

  __device__ __forceinline__ int32_t begin_of(int32_t s) const {
    if (kOrder == Order::kVisual) return row.offsets[s];
    return kOrder == Order::kText ? row.spans[2 * s] - row.offsets[s] : row.spans[2 * s];
  }
  __device__ __forceinline__ void enter(int32_t s) {
    run = s;
    next = s + 1 < row.count ? begin_of(s + 1) : kNoSpan;
    if (s < 0) {
      held = 0;
    } else if (kOrder == Order::kVisual) {
      held = row.spans[2 * s] - row.offsets[s];
    } else {
      held = kOrder == Order::kText ? row.offsets[s + 1] : row.spans[2 * s + 1];
    }
  }
  // The whole warp looks for one place: 32 probes a step, since a step is a trip to memory.
  __device__ __forceinline__ void seek(int32_t place) {
    const int32_t lane = threadIdx.x % kThreadsPerWarp;
    int32_t first = 0, size = row.count;
    while (size > 0) {
      const int32_t step = (size + kThreadsPerWarp - 1) / kThreadsPerWarp;
      const int32_t probe = (lane + 1) * step - 1;
      const bool before = probe < size && begin_of(first + probe) <= place;
      const int32_t whole = __popc(__ballot_sync(kWarp, before));
      const int32_t left = size - whole * step;
      first += whole * step;
      size = left >= step ? step - 1 : left;
    }
    enter(first - 1);
  }
  __device__ __forceinline__ void advance(int32_t place) {
    while (next <= place) enter(run + 1);
  }
  // The visual index of a position that lies in the run.
  __device__ __forceinline__ int32_t visual_index(int32_t position) const {
    return row.offsets[run] + (position - row.spans[2 * run]);
  }
};

// Visual tokens before a position; called by whole warps.
VP_DEVICE int32_t visual_before(const Spans& row, int32_t position) {
  SpanCursor<Order::kPosition> cursor{row, 0, 0, 0};
  cursor.seek(position - 1);
  if (cursor.run < 0) return 0;
  const int32_t begin = row.spans[2 * cursor.run];
  const int32_t end = position < cursor.held ? position : cursor.held;
  return row.offsets[cursor.run] + end - begin;
}

VP_DEVICE bool is_visual(const Spans& row, int32_t position) {
  const int32_t s = span_after(row.spans, row.count, position);
  return s < row.count && row.spans[2 * s] <= position;
}

// One block's share of one row.
struct Share {
  int32_t b, g;         // row, KV head
  Range keys;           // visible
  int32_t text;         // keys in text order before the list; all keys without a list
  int32_t text_before;  // text tokens before keys.begin
  int32_t begin, end;   // of the virtual order
  int32_t split, splits;
};

// All threads get the same answer; called by whole warps.
VP_DEVICE Share share_of(const StreamArgs& args) {
  Share share;
  share.b = blockIdx.z;
  share.g = blockIdx.y;
  share.keys = row_range(args.kv, args.window, share.b);
  share.text = share.keys.end - share.keys.begin;
  share.text_before = 0;
  int32_t total = share.text;
  if (args.selection.indices) {
    const Spans spans = Spans::of(args.visual, share.b);
    const int32_t before = visual_before(spans, share.keys.begin);
    share.text -= visual_before(spans, share.keys.end) - before;
    share.text_before = share.keys.begin - before;
    const int32_t count = args.selection.counts[share.b];
    total = share.text + (count < 0                      ? 0
                          : count > args.selection.k_max ? args.selection.k_max
                                                         : count);
  }
  const int32_t length = split_length(args.rule, total, args.kv_heads);
  share.split = blockIdx.x;
  share.splits = total > 0 ? split_count(total, length) : 1;
  const int64_t begin = static_cast<int64_t>(share.split) * length;
  share.begin = begin < total ? static_cast<int32_t>(begin) : total;
  share.end = total - share.begin < length ? total : share.begin + length;
  return share;
}

// A key that one lane found for its warp.
struct Key {
  int32_t place;  // where its logits lie in their row; -1: there is no key
  bool visual;
  int64_t k, v;  // element offsets from the KV head's base
};

// Walks the tiles of one warp; lane r of the warp finds row r of each tile.
template <bool kScore>
struct KeyFinder {
  Spans spans;
  SpanCursor<kScore ? Order::kPosition : Order::kText> cursor;

  __device__ __forceinline__ void start(const StreamArgs& args, const Share& share, int32_t at) {
    const bool listed = args.selection.indices != nullptr;
    if (!(kScore || listed)) return;
    spans = Spans::of(args.visual, share.b);
    cursor.row = spans;
    if (kScore || at < share.text) {
      cursor.seek(kScore ? share.keys.begin + at : share.text_before + at);
    }
  }

  // `index` of the virtual order; -1 stands for none.
  __device__ __forceinline__ Key find(const StreamArgs& args, const Share& share, int32_t index) {
    Key key = {-1, false, 0, 0};
    if (index < 0) return key;
    int32_t position = -1;
    if (args.selection.indices == nullptr) {
      position = share.keys.begin + index;
      if (kScore) {
        cursor.advance(position);
        key.visual = position < cursor.held;
      }
    } else if (index < share.text) {
      cursor.advance(share.text_before + index);
      position = share.text_before + index + cursor.held;
    } else {
      const int64_t row = static_cast<int64_t>(share.b) * args.selection.k_max;
      const int32_t chosen = args.selection.indices[row + index - share.text];
      const bool visible = chosen >= share.keys.begin && chosen < share.keys.end;
      if (visible && !(args.check_list && !is_visual(spans, chosen))) position = chosen;
    }
    if (position < 0 || !locate(args.kv, share.b, position, key)) return key;
    key.place = position;
    if (kScore && args.keep != Keep::kAll)
      key.place = key.visual ? cursor.visual_index(position) : 0;
    return key;
  }

  // False where the page is not in the pool.
  VP_DEVICE bool locate(const CacheArgs& kv, int32_t b, int32_t position, Key& key) {
    int64_t outer = b, token = position;
    if (kv.table) {
      outer = page_of(kv, b, position);
      token = position % kv.page_size;
      if (outer < 0) return false;
    }
    key.k = outer * kv.k_stride.outer + token * kv.k_stride.token;
    key.v = outer * kv.v_stride.outer + token * kv.v_stride.token;
    return true;
  }
};

}  // namespace visionpulse::cuda
