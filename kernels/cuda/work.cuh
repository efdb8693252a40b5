// SPDX-License-Identifier: Apache-2.0
// Which keys a stream block works on. They are numbered in a virtual order: by position, or, for a
// follower, text first and then the list.
#pragma once

#include "kernels/cuda/query_heads.cuh"
#include "kernels/cuda/spans.cuh"

namespace visionpulse::cuda {

// One block's range of one row's keys.
struct WorkRange {
  int32_t b, g;         // row, KV head
  Range keys;           // visible
  int32_t text;         // keys in front of the list; without a list, all keys
  int32_t text_before;  // text tokens before keys.begin
  int32_t begin, end;   // in the virtual order
  int32_t split, splits;
  QueryRanges queries;  // of several
};

// split_length without its divisions: each takes half as long as a trip to L2, and none overlap.
VP_DEVICE int32_t keys_of_split(const StreamArgs& args, int32_t keys) {
  const SplitRule& rule = args.rule;
  const int64_t most = static_cast<int64_t>(keys) * args.kv_heads + rule.target_parts - 1;
  const int32_t even = static_cast<int32_t>(high_product(most, args.parts_reciprocal));
  const int32_t low = even < rule.shortest ? rule.shortest : even;
  const int32_t cut = low > rule.longest ? rule.longest : low;
  return (cut + rule.tile - 1) & -rule.tile;
}

// All threads get the same answer; called by whole warps.
template <bool kSeveral>
VP_DEVICE WorkRange work_of(const StreamArgs& args, const Spans& spans) {
  WorkRange work;
  work.b = blockIdx.z;
  work.g = kv_head_of<kSeveral>(args);
  // one trip with the range: nothing of a row waits for another
  const int32_t count = args.selection.indices ? args.selection.counts[work.b] : 0;
  work.keys = kSeveral ? work.queries.all(args, work.b) : row_range(args.kv, args.window, work.b);
  work.text = work.keys.end - work.keys.begin;
  work.text_before = 0;
  int32_t total = work.text;
  if (args.selection.indices) {
    const int32_t before = visual_before(spans, work.keys.begin);
    work.text -= visual_before(spans, work.keys.end) - before;
    work.text_before = work.keys.begin - before;
    total = work.text + (count < 0                      ? 0
                         : count > args.selection.k_max ? args.selection.k_max
                                                        : count);
  }
  const int32_t length = keys_of_split(args, total);
  work.split = blockIdx.x;
  work.splits = total > 0 ? split_count(total, length) : 1;
  const int64_t begin = static_cast<int64_t>(work.split) * length;
  work.begin = begin < total ? static_cast<int32_t>(begin) : total;
  work.end = total - work.begin < length ? total : work.begin + length;
  return work;
}

// The index of the block's row and KV head among all of them; with several queries that of its row
// and its query heads.
VP_DEVICE int64_t kv_head_index(const WorkRange& work) {
  return static_cast<int64_t>(work.b) * gridDim.y + static_cast<int32_t>(blockIdx.y);
}

// A key, as one lane finds it for its warp.
struct Key {
  int32_t logit_index;  // where its logits lie; -1: there is no key
  bool visual;
  int64_t k, v;  // element offsets from the KV head's base
};

// Finds the keys of one warp's tiles; lane i finds key i of each tile.
template <bool kScore>
struct KeyFinder {
  SpanCursor<kScore ? Order::kPosition : Order::kText> cursor;
  int32_t kept;  // what the list says of the key that is found next

  VP_DEVICE bool listed(const StreamArgs& args) {
    return !kScore && args.selection.indices != nullptr;
  }

  // `index`, in the virtual order, is the first that is looked for.
  __device__ __forceinline__ void start(const StreamArgs& args, const WorkRange& work,
                                        const Spans& spans, int32_t index) {
    cursor = cursor.before(spans);
    if (kScore) cursor.seek(work.keys.begin + index);
    if (listed(args) && index < work.text) cursor.seek(work.text_before + index);
  }

  // Loads what the list says of a key, a tile before it is looked at.
  __device__ __forceinline__ void look_ahead(const StreamArgs& args, const WorkRange& work,
                                             int32_t index) {
    if (!listed(args) || index < 0 || index < work.text) return;
    const int64_t row = static_cast<int64_t>(work.b) * args.selection.k_max;
    kept = args.selection.indices[row + index - work.text];
  }

  // `index` of the virtual order; -1: none. Called by whole warps.
  __device__ __forceinline__ Key find(const StreamArgs& args, const WorkRange& work,
                                      int32_t index) {
    Key key = {-1, false, 0, 0};
    int32_t position = -1, logit_index;
    if (!listed(args)) {
      if (index >= 0) position = work.keys.begin + index;
      if (kScore) {
        cursor.advance(position);
        key.visual = position >= 0 && cursor.covers(position);
      }
    } else {
      const bool text = index >= 0 && index < work.text;
      cursor.advance(text ? work.text_before + index : -1);
      if (text) {
        position = cursor.position_of(work.text_before + index);
      } else if (index >= 0) {
        const bool visible = kept >= work.keys.begin && kept < work.keys.end;
        if (visible && !(args.check_list && !is_visual(cursor.row, kept))) position = kept;
      }
    }
    logit_index = position;
    if (kScore && args.store != StoredLogits::kAll) {
      const int32_t visual_index = cursor.visual_index(position);
      logit_index = key.visual ? visual_index : 0;
    }
    if (position >= 0 && locate(args.kv, work.b, position, key)) key.logit_index = logit_index;
    return key;
  }

  // False where the page is outside the pool.
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
