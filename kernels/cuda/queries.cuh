// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/query_heads.cuh"

namespace visionpulse::cuda {

// q of all heads of the block on its way to shared memory, in the order of the tile: words of some
// elements each, spread over the threads of the block.
template <class T, class Tile, int kHeads, bool kSeveral>
struct Queries {
  using Word = typename Tile::QueryWord;
  static constexpr int kWords = Tile::kQueryBytes / sizeof(Word);  // of one member
  // Of a thread, in flight: all, for 8 or 16 heads of 128. Several queries have more.
  static constexpr int kAhead = kSeveral ? 8 : kHeads > 8 ? 4 : 2;

  const StreamArgs& args;
  const QueryHeads<kSeveral> heads;
  const T* q;
  int32_t words;
  float k_scale;
  Word word[kAhead];

  __device__ __forceinline__ explicit Queries(const StreamArgs& of)
      : args(of),
        heads(QueryHeads<kSeveral>::of(of, of.team * kHeads)),
        q(computed(heads.base(static_cast<const T*>(of.q), of.q_stride))),
        words(of.team * kWords),
        k_scale(Tile::kScaleBytes ? scale_of(of.kv.k_scale, kv_head_of<kSeveral>(of)) : 1.0f) {}

  __device__ __forceinline__ void load(int32_t first) {
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      const int32_t at = first + u * blockDim.x + threadIdx.x;
      const int32_t i = at < words ? at : words - 1;
      word[u] = Tile::query_word(i % kWords, [&](int of, int d) {
        const int32_t head = i / kWords * kHeads + of;
        return head < heads.count() && d < args.head_dim
                   ? q[heads.offset(head, args.q_stride, args.queries.q_stride) + d]
                   : T{};
      });
    }
  }
  __device__ __forceinline__ void store_all(void* shared, float* factors) {
    const int32_t own = threadIdx.x;
    if (Tile::kScaleBytes && own < args.team * kHeads) factors[own] = args.scale * k_scale;
    VP_UNROLL_1 for (int32_t first = 0;;) {
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t at = first + u * blockDim.x + threadIdx.x;
        if (at < words) static_cast<Word*>(shared)[at] = word[u];
      }
      first += kAhead * blockDim.x;
      if (first >= words) return;
      load(first);
    }
  }
};

}  // namespace visionpulse::cuda
