// SPDX-License-Identifier: Apache-2.0
// One warp's tile of float32 on the CUDA cores, which multiply it exactly. Eight lanes share a key
// for the logits; for the output each lane owns 16-byte columns of V.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

template <int D, int kRows>
struct DotTile {
  static constexpr int kKeys = 8;
  static constexpr int kChunk = 4;  // elements in 16 bytes
  static constexpr int kChunks = D / kChunk;
  static constexpr int kOwnKeys = kKeys / 4;       // of eight lanes
  static constexpr int kZ = kOwnKeys * kRows / 8;  // logits that end up in a lane: heads of one key
  static constexpr int kSlots = kZ;
  static constexpr int kOwned = 1;               // keys of a lane's logits
  static constexpr int kHeadLanes = kRows / kZ;  // neighbouring lanes that hold one key's heads
  static constexpr int kColumns = kChunks < 32 ? kChunks : 32;  // lanes that share a key of V
  static constexpr int kParts = 32 / kColumns;                  // keys of V at once
  static constexpr int kOwnChunks = (kChunks + 31) / 32;
  static constexpr int kQueryBytes = kRows * D * 4;
  static constexpr int kWeightBytes = kKeys * kRows * 4;
  // Eight lanes read 128 bytes in a row: rows need no gap, so a tile may lie as it does in memory.
  static constexpr int kRowBytes = D * 4;
  static constexpr bool kInPlace = true;

  float out[kOwnChunks][kRows][kChunk];

  VP_DEVICE int lane() { return threadIdx.x % 32; }
  VP_DEVICE int slot_of(int i) { return i; }
  VP_DEVICE int owned_of(int) { return 0; }
  VP_DEVICE int head_of(int i) { return lane() % 8 * kZ % kRows + i; }
  VP_DEVICE int key_of(int) { return lane() / 8 * kOwnKeys + lane() % 8 * kZ / kRows; }

  VP_DEVICE float4 load_four(const void* at) { return *static_cast<const float4*>(at); }

  template <class Query>
  VP_DEVICE void load_query(void* shared, Query query) {
    auto* q = static_cast<float*>(shared);
    for (int i = threadIdx.x; i < kRows * D; i += blockDim.x) q[i] = query(i / D, i % D);
  }

  __device__ __forceinline__ void clear() {
    VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
      VP_UNROLL for (int row = 0; row < kRows; ++row) {
        VP_UNROLL for (int e = 0; e < kChunk; ++e) out[c][row][e] = 0.0f;
      }
    }
  }

  VP_DEVICE void dot(const void* shared_q, const char* tile, float (&z)[kZ]) {
    const auto* q = static_cast<const float*>(shared_q);
    const int column = lane() % 8;
    const char* keys = tile + lane() / 8 * kOwnKeys * kRowBytes;
    float sum[kOwnKeys * kRows];
    VP_UNROLL for (int i = 0; i < kOwnKeys * kRows; ++i) sum[i] = 0.0f;
#pragma unroll 2  // more would hold more of K in registers at once
    for (int c = 0; c < kChunks; c += 8) {
      const int chunk = c + column;
      if (kChunks % 8 && chunk >= kChunks) break;
      float4 k[kOwnKeys];
      VP_UNROLL for (int j = 0; j < kOwnKeys; ++j) {
        k[j] = load_four(keys + j * kRowBytes + chunk * 16);
      }
      VP_UNROLL for (int row = 0; row < kRows; ++row) {
        const float4 x = load_four(q + row * D + chunk * kChunk);
        VP_UNROLL for (int j = 0; j < kOwnKeys; ++j) {
          float& s = sum[j * kRows + row];
          s = fmaf(x.x, k[j].x, s), s = fmaf(x.y, k[j].y, s);
          s = fmaf(x.z, k[j].z, s), s = fmaf(x.w, k[j].w, s);
        }
      }
    }
    fold<kOwnKeys * kRows / 2, 4>(sum);
    fold<kOwnKeys * kRows / 4, 2>(sum);
    fold<kOwnKeys * kRows / 8, 1>(sum);
    VP_UNROLL for (int i = 0; i < kZ; ++i) z[i] = sum[i];
  }

  // Sums over eight lanes, halving the values each lane still holds: every sum is the same tree.
  template <int kHalf, int kBit>
  VP_DEVICE void fold(float (&sum)[kOwnKeys * kRows]) {
    const bool upper = lane() & kBit;
    VP_UNROLL for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? sum[i] : sum[i + kHalf];
      const float mine = upper ? sum[i + kHalf] : sum[i];
      sum[i] = mine + __shfl_xor_sync(kWarp, given, kBit);
    }
  }

  __device__ __forceinline__ void rescale(const float (&by)[kSlots]) {
    VP_UNROLL for (int row = 0; row < kRows; ++row) {
      const float factor = __shfl_sync(kWarp, by[row % kZ], row / kZ);
      VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
        VP_UNROLL for (int e = 0; e < kChunk; ++e) out[c][row][e] *= factor;
      }
    }
  }

  __device__ __forceinline__ void accumulate(const float (&p)[kZ], void* shared_weights,
                                             const char* tile) {
    auto* weights = static_cast<float*>(shared_weights);  // [key][row]
    VP_UNROLL for (int i = 0; i < kZ; ++i) weights[key_of(i) * kRows + head_of(i)] = p[i];
    __syncwarp();
    const int part = lane() / kColumns, column = lane() % kColumns;
    if (part < kParts) {
      for (int key = part; key < kKeys; key += kParts) {
        float w[kRows];
        VP_UNROLL for (int row = 0; row < kRows; row += 4) {
          const float4 four = load_four(weights + key * kRows + row);
          w[row] = four.x, w[row + 1] = four.y, w[row + 2] = four.z, w[row + 3] = four.w;
        }
        VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
          const int chunk = column + c * 32;
          if (kChunks % kColumns && chunk >= kChunks) break;
          const float4 v = load_four(tile + key * kRowBytes + chunk * 16);
          VP_UNROLL for (int row = 0; row < kRows; ++row) {
            float (&sum)[kChunk] = out[c][row];
            sum[0] = fmaf(w[row], v.x, sum[0]), sum[1] = fmaf(w[row], v.y, sum[1]);
            sum[2] = fmaf(w[row], v.z, sum[2]), sum[3] = fmaf(w[row], v.w, sum[3]);
          }
        }
      }
    }
  }

  // Leaves the sums as float32 [part][row][D].
  __device__ __forceinline__ void drain(float* to) const {
    const int part = lane() / kColumns, column = lane() % kColumns;
    if (part >= kParts) return;
    VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
      const int chunk = column + c * 32;
      if (kChunks % kColumns && chunk >= kChunks) break;
      VP_UNROLL for (int row = 0; row < kRows; ++row) {
        VP_UNROLL for (int e = 0; e < kChunk; ++e) {
          to[(part * kRows + row) * D + chunk * kChunk + e] = out[c][row][e];
        }
      }
    }
  }
};

}  // namespace visionpulse::cuda
