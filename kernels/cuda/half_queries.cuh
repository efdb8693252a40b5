// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/kinds.cuh"
#include "kernels/cuda/query_heads.cuh"

namespace visionpulse::cuda {

// q of bfloat16 or float16 on its way to shared memory, as float16 in the order of a Float8Tile. A
// warp takes whole heads. Each is multiplied by a power of two that brings its largest element
// to 2^13, or near it: so float16 holds what bfloat16 does, but for what 2^-38 of that element
// outweighs. The logits of a head take the power back, with the scale of K.
template <class Tile, int D, int kHeads, bool kSeveral>
struct HalfQueries {
  static constexpr int kWords = (D + 127) / 128;   // of a head that a lane holds: four columns each
  static constexpr int kAhead = kSeveral ? 8 : 2;  // heads of a warp in flight
  static constexpr uint32_t kMostPower = 127 + 100;

  struct Word {
    Half of[4];
  };

  const StreamArgs& args;
  const QueryHeads<kSeveral> heads;
  const Half* q;
  float k_scale;
  Word word[kAhead][kWords];

  __device__ __forceinline__ explicit HalfQueries(const StreamArgs& of)
      : args(of),
        heads(QueryHeads<kSeveral>::of(of, of.team * kHeads)),
        q(heads.base(static_cast<const Half*>(of.q), of.q_stride)),
        k_scale(scale_of(of.kv.k_scale, kv_head_of<kSeveral>(of))) {}

  __device__ __forceinline__ static int32_t head_of(int32_t first, int u) {
    return first + u * (blockDim.x / kThreadsPerWarp) + threadIdx.x / kThreadsPerWarp;
  }
  __device__ __forceinline__ static int column_of(int w) {
    return (w * kThreadsPerWarp + lane_id()) * 4;
  }

  __device__ __forceinline__ void load(int32_t first) {
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      const int32_t head = head_of(first, u);
      VP_UNROLL for (int w = 0; w < kWords; ++w) {
        VP_UNROLL for (int e = 0; e < 4; ++e) {
          const int32_t d = column_of(w) + e;
          const bool inside = head < heads.count() && d < args.head_dim;
          word[u][w].of[e] =
              inside ? q[heads.offset(head, args.q_stride, args.queries.q_stride) + d] : Half{};
        }
      }
    }
  }

  // `factors` [head]: what the product of a head with K is multiplied with.
  __device__ __forceinline__ void store_all(void* shared, float* factors) {
    const int32_t held = args.team * kHeads;
    VP_UNROLL_1 for (int32_t first = 0;;) {
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t head = head_of(first, u);
        if (head < held) store(static_cast<uint2*>(shared), factors, head, word[u]);
      }
      first += kAhead * blockDim.x / kThreadsPerWarp;
      if (first >= held) return;
      load(first);
    }
  }

  // One head, by its warp.
  __device__ __forceinline__ void store(uint2* shared, float* factors, int32_t head,
                                        const Word (&of)[kWords]) const {
    float x[kWords][4];
    uint32_t top = 0;
    VP_UNROLL for (int w = 0; w < kWords; ++w) {
      VP_UNROLL for (int e = 0; e < 4; ++e) {
        x[w][e] = load_half(args, of[w].of[e]);
        const uint32_t size = float_word(x[w][e]) & 0x7fffffff;
        top = size > top ? size : top;
      }
    }
    // exponents as float32 stores them, 127 too high
    const uint32_t exponent = __reduce_max_sync(kAllLanes, top) >> 23, wanted = 13 + 254 - exponent;
    const uint32_t power = wanted < kMostPower ? wanted : kMostPower;
    const float up = bits_float(power << 23);
    auto* member = shared + head / kHeads * (Tile::kQueryBytes / 8);
    VP_UNROLL for (int w = 0; w < kWords; ++w) {
      if (column_of(w) >= D) continue;
      member[Tile::query_place(head % kHeads, column_of(w))] = {
          Element<Float16>::pack(x[w][0] * up, x[w][1] * up),
          Element<Float16>::pack(x[w][2] * up, x[w][3] * up)};
    }
    if (lane_id() == 0) factors[head] = args.scale * k_scale * bits_float((254 - power) << 23);
  }
};

}  // namespace visionpulse::cuda
