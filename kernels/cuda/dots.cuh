// SPDX-License-Identifier: Apache-2.0
// One warp's tile on the CUDA cores: exact float32 products for few query heads, or float32 inputs.
// Eight lanes share a key for the logits; for the output each lane owns 16-byte columns of V.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

template <class T>
VP_DEVICE void load_chunk(const void* at, float (&x)[Element<T>::kChunk]) {
  const uint4 word = *static_cast<const uint4*>(at);
  if constexpr (sizeof(T) == 4) {
    x[0] = bits_float(word.x), x[1] = bits_float(word.y);
    x[2] = bits_float(word.z), x[3] = bits_float(word.w);
  } else {
    Element<T>::unpack(word.x, x), Element<T>::unpack(word.y, x + 2);
    Element<T>::unpack(word.z, x + 4), Element<T>::unpack(word.w, x + 6);
  }
}

template <class T, int D, int kRows>
struct DotTile {
  static constexpr int kKeys = sizeof(T) == 2 ? 16 : 8;
  static constexpr int kChunk = Element<T>::kChunk;
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

  float out[kOwnChunks][kRows][kChunk];

  VP_DEVICE int lane() { return threadIdx.x % 32; }
  VP_DEVICE int slot_of(int i) { return i; }
  VP_DEVICE int owned_of(int) { return 0; }
  VP_DEVICE int head_of(int i) { return lane() % 8 * kZ % kRows + i; }
  VP_DEVICE int key_of(int) { return lane() / 8 * kOwnKeys + lane() % 8 * kZ / kRows; }

  // q as float32 [row][chunk / 4 planes][chunk][4], so that eight lanes read 128 bytes in a row.
  template <class Query>
  VP_DEVICE void load_query(void* shared, Query query) {
    auto* q = static_cast<float*>(shared);
    for (int i = threadIdx.x; i < kRows * D; i += blockDim.x) {
      const int row = i / D, d = i % D;
      const int plane = d % kChunk / 4, chunk = d / kChunk;
      q[((row * (kChunk / 4) + plane) * kChunks + chunk) * 4 + d % 4] =
          Element<T>::load(query(row, d));
    }
  }

  __device__ __forceinline__ void clear() {
    VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
      VP_UNROLL for (int row = 0; row < kRows; ++row) {
        VP_UNROLL for (int e = 0; e < kChunk; ++e) out[c][row][e] = 0.0f;
      }
    }
  }

  VP_DEVICE void dot(const void* shared_q, const char* tile, int row_bytes, float (&z)[kZ]) {
    const auto* q = static_cast<const float*>(shared_q);
    const int column = lane() % 8;
    const char* keys = tile + lane() / 8 * kOwnKeys * row_bytes;
    float sum[kOwnKeys * kRows];
    VP_UNROLL for (int i = 0; i < kOwnKeys * kRows; ++i) sum[i] = 0.0f;
#pragma unroll 2  // more would hold more of K in registers at once
    for (int c = 0; c < kChunks; c += 8) {
      const int chunk = c + column;
      if (kChunks % 8 && chunk >= kChunks) break;
      float k[kOwnKeys][kChunk];
      VP_UNROLL for (int j = 0; j < kOwnKeys; ++j) {
        load_chunk<T>(keys + j * row_bytes + chunk * 16, k[j]);
      }
      VP_UNROLL for (int row = 0; row < kRows; ++row) {
        VP_UNROLL for (int plane = 0; plane < kChunk / 4; ++plane) {
          const float4 x = *reinterpret_cast<const float4*>(
              q + ((row * (kChunk / 4) + plane) * kChunks + chunk) * 4);
          VP_UNROLL for (int j = 0; j < kOwnKeys; ++j) {
            const float* y = k[j] + plane * 4;
            float& s = sum[j * kRows + row];
            s = fmaf(x.x, y[0], s), s = fmaf(x.y, y[1], s);
            s = fmaf(x.z, y[2], s), s = fmaf(x.w, y[3], s);
          }
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
                                             const char* tile, int row_bytes) {
    auto* weights = static_cast<float*>(shared_weights);  // [key][row]
    VP_UNROLL for (int i = 0; i < kZ; ++i) weights[key_of(i) * kRows + head_of(i)] = p[i];
    __syncwarp();
    const int part = lane() / kColumns, column = lane() % kColumns;
    if (part < kParts) {
      for (int key = part; key < kKeys; key += kParts) {
        float w[kRows];
        VP_UNROLL for (int row = 0; row < kRows; row += 4) {
          const float4 four = *reinterpret_cast<const float4*>(weights + key * kRows + row);
          w[row] = four.x, w[row + 1] = four.y, w[row + 2] = four.z, w[row + 3] = four.w;
        }
        VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
          const int chunk = column + c * 32;
          if (kChunks % kColumns && chunk >= kChunks) break;
          float v[kChunk];
          load_chunk<T>(tile + key * row_bytes + chunk * 16, v);
          VP_UNROLL for (int row = 0; row < kRows; ++row) {
            VP_UNROLL for (int e = 0; e < kChunk; ++e) {
              out[c][row][e] = fmaf(w[row], v[e], out[c][row][e]);
            }
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
