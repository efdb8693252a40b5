// SPDX-License-Identifier: Apache-2.0
// One warp's tile on the tensor cores. Both products are transposed so that query heads are the N
// of m16n8k16: A is K, keys x D, and then V transposed, D x keys. So heads are padded to 8, not
// to 16.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

template <class T, int D, int kHeads>
struct MmaTile {
  static constexpr int kKeys = 16;
  static constexpr int kTiles = kHeads / 8;  // of heads
  static constexpr int kZ = kTiles * 4;
  static constexpr int kSlots = kTiles * 2;  // heads of a lane
  static constexpr int kOwned = 2;           // keys of a lane
  static constexpr int kHeadLanes = 4;
  static constexpr int kParts = 1;
  static constexpr int kQueryBytes = kHeads * D * 2;
  static constexpr int kScaleBytes = 0;
  static constexpr int kWeightBytes = 0;  // they stay in registers
  static constexpr int kSumBytes = kHeads * D * 4;
  static constexpr bool kTurned = false;
  // The gap spreads the eight keys that one matrix load reads at a time over all banks.
  static constexpr int kKeyBytes = D * 2 + 16;
  static constexpr bool kInPlace = false;

  float out[D / 16][kTiles][4];

  VP_DEVICE int slot_of(int i) { return i / 4 * 2 + i % 2; }
  VP_DEVICE int owned_of(int i) { return i % 4 / 2; }
  VP_DEVICE int head_of(int i) { return i / 4 * 8 + lane_id() % 4 * 2 + i % 2; }
  VP_DEVICE int key_of(int i) { return lane_id() / 4 + i % 4 / 2 * 8; }

  // q in the order of the B fragments: [D / 16][head tile][lane], 8 bytes each.
  using QueryWord = uint2;
  template <class Query>
  VP_DEVICE QueryWord query_word(int i, Query query) {
    const int in = i % 32, tile = i / 32 % kTiles, step = i / 32 / kTiles;
    const int head = tile * 8 + in / 4, d = step * 16 + in % 4 * 2;
    const auto pair = [&](int at) {
      return query(head, at).bits | static_cast<uint32_t>(query(head, at + 1).bits) << 16;
    };
    return uint2{pair(d), pair(d + 8)};
  }

  __device__ __forceinline__ void clear() {
    VP_UNROLL for (int m = 0; m < D / 16; ++m) {
      VP_UNROLL for (int n = 0; n < kTiles; ++n) {
        VP_UNROLL for (int i = 0; i < 4; ++i) out[m][n][i] = 0.0f;
      }
    }
  }

  VP_DEVICE void dot(const void* shared_q, const char* tile, float (&z)[kZ]) {
    const auto* q = static_cast<const uint2*>(shared_q);
    const int key = lane_id() % 16, half = lane_id() / 16;
    float sum[kTiles][4];
    VP_UNROLL for (int n = 0; n < kTiles; ++n) {
      VP_UNROLL for (int i = 0; i < 4; ++i) sum[n][i] = 0.0f;
    }
    VP_UNROLL for (int step = 0; step < D / 16; ++step) {
      uint32_t a[4];
      load_matrices(a, tile + key * kKeyBytes + step * 32 + half * 16);
      VP_UNROLL for (int n = 0; n < kTiles; ++n) {
        const uint2 b = q[(step * kTiles + n) * 32 + lane_id()];
        multiply(T{}, sum[n], a, b.x, b.y);
      }
    }
    VP_UNROLL for (int i = 0; i < kZ; ++i) z[i] = sum[i / 4][i % 4];
  }

  __device__ __forceinline__ void rescale(const float (&factors)[kSlots]) {
    VP_UNROLL for (int m = 0; m < D / 16; ++m) {
      VP_UNROLL for (int n = 0; n < kTiles; ++n) {
        VP_UNROLL for (int i = 0; i < 4; ++i) out[m][n][i] *= factors[n * 2 + i % 2];
      }
    }
  }

  __device__ __forceinline__ void accumulate(const float (&p)[kZ], void*, const char* tile) {
    uint32_t b[kTiles][2];
    VP_UNROLL for (int n = 0; n < kTiles; ++n) {
      // keys x heads, as the first product makes them, transposed to heads x keys
      b[n][0] = transpose_matrix(Element<T>::pack(p[n * 4], p[n * 4 + 1]));
      b[n][1] = transpose_matrix(Element<T>::pack(p[n * 4 + 2], p[n * 4 + 3]));
    }
    const int key = lane_id() / 16 * 8 + lane_id() % 8, half = lane_id() / 8 % 2;
    VP_UNROLL for (int m = 0; m < D / 16; ++m) {
      uint32_t a[4];
      load_matrices_transposed(a, tile + key * kKeyBytes + m * 32 + half * 16);
      VP_UNROLL for (int n = 0; n < kTiles; ++n) multiply(T{}, out[m][n], a, b[n][0], b[n][1]);
    }
  }

  // Writes the sums as float32 [head][D].
  __device__ __forceinline__ void write_sums(float* to) const {
    VP_UNROLL for (int m = 0; m < D / 16; ++m) {
      VP_UNROLL for (int n = 0; n < kTiles; ++n) {
        VP_UNROLL for (int i = 0; i < 4; ++i) {
          const int d = m * 16 + lane_id() / 4 + i / 2 * 8;
          to[head_of(n * 4 + i % 2) * D + d] = out[m][n][i];
        }
      }
    }
  }
};

}  // namespace visionpulse::cuda
