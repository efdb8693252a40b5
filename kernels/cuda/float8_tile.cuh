// SPDX-License-Identifier: Apache-2.0
// One warp's tile of 8-bit K and V on the tensor cores, as float16. Both products are those of
// mma_tile.cuh. No matrix load knows bytes, so a lane reads 16 of a key at once, and the order of
// their columns in a product is what it has read:
//
//   K: lane t of four has columns 16 t to 16 t + 15 of 64, four for each product: q is stored so
//   V: lane r of eight has columns 16 r to 16 r + 15 of 128, of the four keys that it holds weights
//      of. Bytes of two keys are interleaved, then widened in pairs.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/float8.cuh"

namespace visionpulse::cuda {

template <int D, int kHeads>
struct Float8Tile {
  static_assert(D % 64 == 0);
  static constexpr int kProductKeys = 16;
  // Of 16 keys: with two a tile has the bytes of one of float16. Of the longest heads registers
  // hold one.
  static constexpr int kProducts = kHeads * D >= 16 * 256 ? 1 : 2;
  static constexpr int kKeys = kProducts * kProductKeys;
  static constexpr int kTiles = kHeads / 8;  // of heads
  static constexpr int kZ = kProducts * kTiles * 4;
  static constexpr int kSlots = kTiles * 2;     // heads of a lane
  static constexpr int kOwned = kProducts * 2;  // keys of a lane
  static constexpr int kHeadLanes = 4;
  static constexpr int kParts = 1;
  static constexpr int kQueryBytes = kHeads * D * 2;  // as float16
  static constexpr int kScaleBytes = kHeads * 4;
  static constexpr int kWeightBytes = 0;  // they stay in registers
  static constexpr int kSumBytes = kHeads * D * 4;
  static constexpr bool kTurned = true;  // chunk_offset says where a chunk of a key lies
  static constexpr int kKeyBytes = D;
  static constexpr bool kInPlace = false;
  static constexpr int kChunks = D / 16;                       // of a key
  static constexpr int kWide = D / 128, kRest = D % 128 / 64;  // V: steps of 128 columns, and of 64

  float out[D / 16][kTiles][4];

  VP_DEVICE int slot_of(int i) { return i / 4 % kTiles * 2 + i % 2; }
  VP_DEVICE int owned_of(int i) { return i / 4 / kTiles * 2 + i % 4 / 2; }
  VP_DEVICE int head_of(int i) { return i / 4 % kTiles * 8 + lane_id() % 4 * 2 + i % 2; }
  VP_DEVICE int key_of(int i) {
    return i / 4 / kTiles * kProductKeys + lane_id() / 4 + i % 4 / 2 * 8;
  }

  // Where a chunk of 16 bytes of a key lies. Turned so that the eight lanes which read at a time
  // meet all banks: four chunks of two keys of K, two chunks of four keys, every other one, of V.
  VP_DEVICE int chunk_offset(int key, int chunk) {
    const int turn = key / 2 % 4 * 2 ^ (kChunks % 8 == 0 ? key % 2 * 4 : 0);
    return ((key * kChunks + chunk) ^ turn) * 16;
  }

  // The place of four columns of q, from `d` on, among words of eight bytes.
  VP_DEVICE int query_place(int head, int d) {
    const int step = d / 64 * 2 + d % 16 / 8, lane = head % 8 * 4 + d % 64 / 16;
    return ((step * kTiles + head / 8) * kThreadsPerWarp + lane) * 2 + d % 8 / 4;
  }

  __device__ __forceinline__ void clear() {
    VP_UNROLL for (int m = 0; m < D / 16; ++m) {
      VP_UNROLL for (int n = 0; n < kTiles; ++n) {
        VP_UNROLL for (int i = 0; i < 4; ++i) out[m][n][i] = 0.0f;
      }
    }
  }

  VP_DEVICE uint32_t word_of(const uint4& chunk, int i) {
    return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
  }

  VP_DEVICE void dot(const void* shared_q, const char* tile, float (&z)[kZ]) {
    const auto* q = static_cast<const uint4*>(shared_q);
    const int key = lane_id() / 4, chunk = lane_id() % 4;
    float sum[kProducts * kTiles][4];
    VP_UNROLL for (int n = 0; n < kProducts * kTiles; ++n) {
      VP_UNROLL for (int i = 0; i < 4; ++i) sum[n][i] = 0.0f;
    }
    VP_UNROLL for (int column = 0; column < D / 64; ++column) {
      uint4 k[kProducts][2];
      VP_UNROLL for (int p = 0; p < kProducts; ++p) {
        VP_UNROLL for (int half = 0; half < 2; ++half) {
          const int of = p * kProductKeys + half * 8 + key;
          k[p][half] = load_chunk(tile + chunk_offset(of, column * 4 + chunk));
        }
      }
      VP_UNROLL for (int pair = 0; pair < 2; ++pair) {
        uint4 b[kTiles];
        VP_UNROLL for (int n = 0; n < kTiles; ++n) {
          b[n] = q[((column * 2 + pair) * kTiles + n) * kThreadsPerWarp + lane_id()];
        }
        VP_UNROLL for (int p = 0; p < kProducts; ++p) {
          VP_UNROLL for (int step = 0; step < 2; ++step) {
            const FourHalves upper = widen(word_of(k[p][0], pair * 2 + step));
            const FourHalves lower = widen(word_of(k[p][1], pair * 2 + step));
            const uint32_t a[4] = {upper.low, lower.low, upper.high, lower.high};
            VP_UNROLL for (int n = 0; n < kTiles; ++n) {
              multiply(Float16{}, sum[p * kTiles + n], a, step ? b[n].z : b[n].x,
                       step ? b[n].w : b[n].y);
            }
          }
        }
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
    VP_UNROLL for (int product = 0; product < kProducts; ++product) {
      uint32_t b[kTiles][2];
      VP_UNROLL for (int n = 0; n < kTiles; ++n) {
        // keys x heads, as the first product makes them, transposed to heads x keys
        const float* of = p + (product * kTiles + n) * 4;
        b[n][0] = transpose_matrix(Element<Float16>::pack(of[0], of[1]));
        b[n][1] = transpose_matrix(Element<Float16>::pack(of[2], of[3]));
      }
      const int first = product * kProductKeys + lane_id() % 4 * 2, lane = lane_id() / 4;
      VP_UNROLL for (int wide = 0; wide < kWide; ++wide) {
        uint4 v[4];
        VP_UNROLL for (int i = 0; i < 4; ++i) {
          v[i] = load_chunk(tile + chunk_offset(first + i / 2 * 8 + i % 2, wide * 8 + lane));
        }
        VP_UNROLL for (int word = 0; word < 4; ++word) {
          const uint32_t of[4] = {word_of(v[0], word), word_of(v[1], word), word_of(v[2], word),
                                  word_of(v[3], word)};
          add_columns(wide * 8 + word * 2, of, b);
        }
      }
      if constexpr (kRest != 0) {  // lane r has eight columns
        uint2 v[4];
        VP_UNROLL for (int i = 0; i < 4; ++i) {
          const int at = chunk_offset(first + i / 2 * 8 + i % 2, kWide * 8 + lane / 2);
          v[i] = *reinterpret_cast<const uint2*>(tile + at + lane % 2 * 8);
        }
        VP_UNROLL for (int word = 0; word < 2; ++word) {
          const uint32_t of[4] = {word ? v[0].y : v[0].x, word ? v[1].y : v[1].x,
                                  word ? v[2].y : v[2].x, word ? v[3].y : v[3].x};
          add_columns(kWide * 8 + word * 2, of, b);
        }
      }
    }
  }

  // Four columns of four keys: two products of sixteen columns, each lane with two.
  __device__ __forceinline__ void add_columns(int m, const uint32_t (&v)[4],
                                              const uint32_t (&b)[kTiles][2]) {
    VP_UNROLL for (int pair = 0; pair < 2; ++pair) {
      const uint32_t selector = pair ? 0x7362 : 0x5140;  // two columns of the first key and second
      const FourHalves near = widen(pick_bytes(v[0], v[1], selector));
      const FourHalves far = widen(pick_bytes(v[2], v[3], selector));
      const uint32_t a[4] = {near.low, near.high, far.low, far.high};
      VP_UNROLL for (int n = 0; n < kTiles; ++n) {
        multiply(Float16{}, out[m + pair][n], a, b[n][0], b[n][1]);
      }
    }
  }

  // Writes the sums as float32 [head][D].
  __device__ __forceinline__ void write_sums(float* to) const {
    const int lane = lane_id() / 4;
    VP_UNROLL for (int m = 0; m < D / 16; m += 2) {
      const bool wide = m < kWide * 8;
      const int d =
          wide ? m / 8 * 128 + lane * 16 + m % 8 * 2 : kWide * 128 + lane * 8 + (m - kWide * 8) * 2;
      VP_UNROLL for (int n = 0; n < kTiles; ++n) {
        VP_UNROLL for (int i = 0; i < 2; ++i) {
          *reinterpret_cast<float4*>(to + head_of(n * 4 + i) * D + d) =
              float4{out[m][n][i], out[m][n][i + 2], out[m + 1][n][i], out[m + 1][n][i + 2]};
        }
      }
    }
  }

  VP_DEVICE uint4 load_chunk(const char* at) { return *reinterpret_cast<const uint4*>(at); }
};

}  // namespace visionpulse::cuda
