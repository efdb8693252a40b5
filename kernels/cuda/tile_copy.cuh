// SPDX-License-Identifier: Apache-2.0
// Copies a tile whose keys or values do not come as one run of bytes: 16 bytes a lane by cp.async,
// or less where they are not aligned to 16 bytes.
#pragma once

#include "kernels/cuda/float8.cuh"

namespace visionpulse::cuda {

// A 16-byte chunk of a key or value: where it comes from and goes to.
template <class T>
struct ChunkSource {
  const T* from;
  char* to;
  int valid;  // elements; the others become 0

  // For vectors that do not all start at a multiple of 16 bytes.
  __device__ __forceinline__ void copy_narrow(int32_t align) const {
    constexpr int kChunk = Element<T>::kChunk;
    if (sizeof(T) == 4 || align >= 4) {
      for (int word = 0; word < 4; ++word) {
        const bool inside = valid * static_cast<int>(sizeof(T)) > word * 4;
        copy_4(to + word * 4, reinterpret_cast<const char*>(from) + (inside ? word * 4 : 0),
               inside ? 4 : 0);
      }
    } else {
      for (int e = 0; e < kChunk; ++e) reinterpret_cast<T*>(to)[e] = e < valid ? from[e] : T{};
    }
  }
};

// Copies the keys or values of one tile; those outside `valid_mask` become 0. Lane i passes the
// `offset` of key i.
template <class T, int D, class Tile>
VP_DEVICE void copy_tile(char* tile, const T* base, int64_t offset, uint32_t valid_mask,
                         int32_t head_dim, int32_t align) {
  constexpr int kChunk = Element<T>::kChunk, kChunks = D / kChunk, kKeys = Tile::kKeys;
  const auto source = [&](int at) {
    const int key = at / kChunks, chunk = at % kChunks;
    const int64_t from_key = __shfl_sync(kAllLanes, offset, key);
    int valid = (valid_mask >> key & 1) ? head_dim - chunk * kChunk : 0;
    valid = valid < 0 ? 0 : valid > kChunk ? kChunk : valid;
    const T* from = valid ? base + from_key + chunk * kChunk : base;
    if constexpr (Tile::kTurned) {
      return ChunkSource<T>{from, tile + Tile::chunk_offset(key, chunk), valid};
    } else {
      return ChunkSource<T>{from, tile + key * Tile::kKeyBytes + chunk * 16, valid};
    }
  };
  const int lane = lane_id();
  if (align >= 16) {
    // Unrolled in full, the addresses of all chunks stay in registers: too many for a long key, or
    // for one that is no power of two.
    constexpr int kSteps = kKeys * kChunks / 32;
    [[maybe_unused]] constexpr int kUnroll = kChunks & (kChunks - 1) || kSteps > 8 ? 4 : kSteps;
#pragma unroll kUnroll
    for (int i = 0; i < kKeys * kChunks; i += 32) {
      const ChunkSource<T> chunk = source(i + lane);
      copy_16(chunk.to, chunk.from, chunk.valid * static_cast<int>(sizeof(T)));
    }
  } else {
    VP_UNROLL_1 for (int i = 0; i < kKeys * kChunks; i += 32) source(i + lane).copy_narrow(align);
  }
}

}  // namespace visionpulse::cuda
