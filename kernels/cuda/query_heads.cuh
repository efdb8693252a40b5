// SPDX-License-Identifier: Apache-2.0
// The query heads that one block works for: those of its KV head, of one query of the row or of
// several. Several queries lie one behind the other, so that a block reads K and V once for all;
// more than it holds go to further blocks, side by side in the grid, which find K and V in L2.
#pragma once

#include "kernels/common/visible_range.h"
#include "kernels/cuda/args.h"
#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

// What a kernel is compiled for, by its head tile.
VP_HD constexpr bool of_several_queries(int head_tile) { return head_tile > kMaxGroup; }

// The KV head of a block.
template <bool kSeveral>
VP_DEVICE int32_t kv_head_of(const StreamArgs& args) {
  return kSeveral ? blockIdx.y / args.head_blocks : blockIdx.y;
}

// A head of the block is counted from 0, a head of the KV head from the first of its first query.
template <bool kSeveral>
struct QueryHeads {
  const StreamArgs& args;
  int32_t first;  // of the block, among all heads of the KV head
  int32_t own;    // heads of the block

  VP_DEVICE QueryHeads of(const StreamArgs& args, int32_t held) {
    QueryHeads heads = {args, 0, 0};
    if constexpr (kSeveral) {
      heads.first = blockIdx.y % args.head_blocks * held;
      const int32_t left = args.queries.count * args.group - heads.first;
      heads.own = left < held ? left : held;
    }
    return heads;
  }

  __device__ __forceinline__ int32_t count() const { return kSeveral ? own : args.group; }

  // The query of a head of the block; exact below kMaxQueries * kMaxGroup heads.
  __device__ __forceinline__ int32_t query_of(int32_t head) const {
    return (first + head) * args.group_reciprocal >> 16;
  }
  // Where a head of the block, `head` behind another one, lies among the statistics and logits,
  // [B * Q, H].
  __device__ __forceinline__ int64_t row_of(const int32_t b, int32_t g, int32_t other,
                                            int32_t head) const {
    if constexpr (kSeveral) {
      const int32_t query = query_of(other + head);
      return (static_cast<int64_t>(b) * args.queries.count + query) * args.heads + g * args.group +
             (first + other + head - query * args.group);
    } else {
      return static_cast<int64_t>(b) * args.heads + (g * args.group + other) + head;
    }
  }
  // From the first element of q or of the output to the row's first of the KV head.
  template <class T>
  __device__ __forceinline__ T* base(T* all, const HeadStrides& stride) const {
    const uint32_t g = kSeveral ? blockIdx.y / args.head_blocks : blockIdx.y;
    return all + static_cast<int64_t>(blockIdx.z) * stride.row +
           static_cast<int64_t>(g) * args.group * stride.head;
  }
  // Elements from there to a head of the block.
  __device__ __forceinline__ int64_t offset(int32_t head, const HeadStrides& stride,
                                            int64_t query_stride) const {
    if constexpr (kSeveral) {
      const int32_t query = query_of(head);
      return query * query_stride + (first + head - query * args.group) * stride.head;
    } else {
      return head * stride.head;
    }
  }
};

// The keys that the queries of a row see: each up to its own, and in the window that ends there.
struct QueryRanges {
  int32_t end;         // of the last query
  int32_t last;        // query
  int32_t first_real;  // query
  int32_t window;      // 0: none

  __device__ __forceinline__ bool sees(int32_t query, int32_t position) const {
    const int32_t own_end = end - (last - query);
    return query >= first_real && position < own_end &&
           (window == 0 || position >= own_end - window);
  }
  // Whether each query sees all of some keys, from a position on.
  __device__ __forceinline__ bool all_see(int32_t position, int32_t keys) const {
    return first_real == 0 && position + keys <= end - last &&
           (window == 0 || position >= end - window);
  }
  // Those that any query sees.
  __device__ __forceinline__ Range all(const StreamArgs& args, int32_t b) {
    const QueriesArgs& queries = args.queries;
    const int32_t real = queries.real ? queries.real[b] : queries.count;
    Range keys =
        visible_range(args.kv.starts ? args.kv.starts[b] : 0,
                      args.kv.lengths ? args.kv.lengths[b] : args.kv.capacity, args.kv.capacity, 0);
    end = keys.end, last = queries.count - 1, window = args.window;
    first_real = real < 0 ? queries.count : real > queries.count ? 0 : queries.count - real;
    if (first_real > last) return {0, 0};
    const int32_t begin = end - (last - first_real) - window;
    if (window > 0 && begin > keys.begin) keys.begin = begin;
    return keys;
  }
};

}  // namespace visionpulse::cuda
