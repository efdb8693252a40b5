// SPDX-License-Identifier: Apache-2.0
// One warp's tile on the CUDA cores, beside queries of float32, which tensor cores would round. For
// the logits eight lanes share a key; for the output each lane owns four columns of V at a time.
#pragma once

#include "kernels/cuda/float8.cuh"

namespace visionpulse::cuda {

// K and V are float or E4m3.
template <class Cache, int D, int kHeads>
struct DotTile {
  static constexpr int kKeys = 8;
  static constexpr int kChunk = 4;  // elements that a lane reads at once
  static constexpr int kChunks = D / kChunk;
  static constexpr int kOwnKeys = kKeys / 4;        // of eight lanes
  static constexpr int kZ = kOwnKeys * kHeads / 8;  // logits of a lane: heads of one key
  static constexpr int kSlots = kZ;
  static constexpr int kOwned = 1;                // keys of a lane's logits
  static constexpr int kHeadLanes = kHeads / kZ;  // neighbouring lanes that hold one key's heads
  static constexpr int kColumns = kChunks < 32 ? kChunks : 32;  // lanes that share a key of V
  static constexpr int kParts = 32 / kColumns;                  // keys of V at once
  static constexpr int kOwnChunks = (kChunks + 31) / 32;
  static constexpr int kQueryBytes = kHeads * D * 4;
  static constexpr int kScaleBytes = sizeof(Cache) == 1 ? kHeads * 4 : 0;
  static constexpr int kWeightBytes = kKeys * kHeads * 4;
  static constexpr int kSumBytes = kParts * kHeads * D * 4;
  // Eight lanes read 128 bytes of float32 at once, free of bank conflicts: keys need no gap between
  // them, so a tile may lie as it does in memory. Of bytes they read 32, and a gap spreads the
  // keys.
  static constexpr bool kInPlace = sizeof(Cache) == 4;
  static constexpr bool kTurned = false;
  static constexpr int kKeyBytes = D * sizeof(Cache) + (kInPlace ? 0 : 16);

  float out[kOwnChunks][kHeads][kChunk];

  VP_DEVICE int slot_of(int i) { return i; }
  VP_DEVICE int owned_of(int) { return 0; }
  VP_DEVICE int head_of(int i) { return lane_id() % 8 * kZ % kHeads + i; }
  VP_DEVICE int key_of(int) { return lane_id() / 8 * kOwnKeys + lane_id() % 8 * kZ / kHeads; }

  VP_DEVICE float4 load_four(const void* at) { return *static_cast<const float4*>(at); }
  // Of a key or value.
  VP_DEVICE float4 load_columns(const char* key, int chunk) {
    if constexpr (sizeof(Cache) == 4) {
      return load_four(key + chunk * 16);
    } else {
      return floats_of_e4m3(*reinterpret_cast<const uint32_t*>(key + chunk * 4));
    }
  }

  using QueryWord = float;
  template <class Query>
  VP_DEVICE QueryWord query_word(int i, Query query) {
    return query(i / D, i % D);
  }

  __device__ __forceinline__ void clear() {
    VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
      VP_UNROLL for (int head = 0; head < kHeads; ++head) {
        VP_UNROLL for (int e = 0; e < kChunk; ++e) out[c][head][e] = 0.0f;
      }
    }
  }

  VP_DEVICE void dot(const void* shared_q, const char* tile, float (&z)[kZ]) {
    const auto* q = static_cast<const float*>(shared_q);
    const int column = lane_id() % 8;
    const char* keys = tile + lane_id() / 8 * kOwnKeys * kKeyBytes;
    float sum[kOwnKeys * kHeads];
    VP_UNROLL for (int i = 0; i < kOwnKeys * kHeads; ++i) sum[i] = 0.0f;
#pragma unroll 2  // more would hold more of K in registers
    for (int c = 0; c < kChunks; c += 8) {
      const int chunk = c + column;
      if (kChunks % 8 && chunk >= kChunks) break;
      float4 k[kOwnKeys];
      VP_UNROLL for (int j = 0; j < kOwnKeys; ++j) {
        k[j] = load_columns(keys + j * kKeyBytes, chunk);
      }
      VP_UNROLL for (int head = 0; head < kHeads; ++head) {
        const float4 x = load_four(q + head * D + chunk * kChunk);
        VP_UNROLL for (int j = 0; j < kOwnKeys; ++j) {
          float& s = sum[j * kHeads + head];
          s = fmaf(x.x, k[j].x, s), s = fmaf(x.y, k[j].y, s);
          s = fmaf(x.z, k[j].z, s), s = fmaf(x.w, k[j].w, s);
        }
      }
    }
    fold<kOwnKeys * kHeads / 2, 4>(sum);
    fold<kOwnKeys * kHeads / 4, 2>(sum);
    fold<kOwnKeys * kHeads / 8, 1>(sum);
    VP_UNROLL for (int i = 0; i < kZ; ++i) z[i] = sum[i];
  }

  // Sums over eight lanes; each step halves the values that a lane holds. All sums are the same
  // tree.
  template <int kHalf, int kBit>
  VP_DEVICE void fold(float (&sum)[kOwnKeys * kHeads]) {
    const bool upper = lane_id() & kBit;
    VP_UNROLL for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? sum[i] : sum[i + kHalf];
      const float mine = upper ? sum[i + kHalf] : sum[i];
      sum[i] = mine + __shfl_xor_sync(kAllLanes, sent, kBit);
    }
  }

  __device__ __forceinline__ void rescale(const float (&factors)[kSlots]) {
    VP_UNROLL for (int head = 0; head < kHeads; ++head) {
      const float factor = __shfl_sync(kAllLanes, factors[head % kZ], head / kZ);
      VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
        VP_UNROLL for (int e = 0; e < kChunk; ++e) out[c][head][e] *= factor;
      }
    }
  }

  __device__ __forceinline__ void accumulate(const float (&p)[kZ], void* shared_weights,
                                             const char* tile) {
    auto* weights = static_cast<float*>(shared_weights);  // [key][head]
    VP_UNROLL for (int i = 0; i < kZ; ++i) weights[key_of(i) * kHeads + head_of(i)] = p[i];
    __syncwarp();
    const int part = lane_id() / kColumns, column = lane_id() % kColumns;
    if (part < kParts) {
      for (int key = part; key < kKeys; key += kParts) {
        float w[kHeads];
        VP_UNROLL for (int head = 0; head < kHeads; head += 4) {
          const float4 four = load_four(weights + key * kHeads + head);
          w[head] = four.x, w[head + 1] = four.y, w[head + 2] = four.z, w[head + 3] = four.w;
        }
        VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
          const int chunk = column + c * 32;
          if (kChunks % kColumns && chunk >= kChunks) break;
          const float4 v = load_columns(tile + key * kKeyBytes, chunk);
          VP_UNROLL for (int head = 0; head < kHeads; ++head) {
            float (&sum)[kChunk] = out[c][head];
            sum[0] = fmaf(w[head], v.x, sum[0]), sum[1] = fmaf(w[head], v.y, sum[1]);
            sum[2] = fmaf(w[head], v.z, sum[2]), sum[3] = fmaf(w[head], v.w, sum[3]);
          }
        }
      }
    }
  }

  // Writes the sums as float32 [part][head][D].
  __device__ __forceinline__ void write_sums(float* to) const {
    const int part = lane_id() / kColumns, column = lane_id() % kColumns;
    if (part >= kParts) return;
    VP_UNROLL for (int c = 0; c < kOwnChunks; ++c) {
      const int chunk = column + c * 32;
      if (kChunks % kColumns && chunk >= kChunks) break;
      VP_UNROLL for (int head = 0; head < kHeads; ++head) {
        VP_UNROLL for (int e = 0; e < kChunk; ++e) {
          to[(part * kHeads + head) * D + chunk * kChunk + e] = out[c][head][e];
        }
      }
    }
  }
};

}  // namespace visionpulse::cuda
