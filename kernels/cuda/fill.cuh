// SPDX-License-Identifier: Apache-2.0
// How the rows of a tile reach shared memory where they do not come as one run of bytes: 16 bytes a
// lane by cp.async, or less where rows start anywhere.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

// What a 16-byte chunk of a row takes from memory.
template <class T>
struct ChunkSource {
  const T* from;
  char* to;
  int valid;  // elements; the others become 0

  // Rows that do not all start at a multiple of 16 bytes.
  __device__ __forceinline__ void copy_narrow(int32_t align) const {
    constexpr int kChunk = Element<T>::kChunk;
    if (sizeof(T) == 4 || align >= 4) {
      for (int word = 0; word < 4; ++word) {
        const bool there = valid * static_cast<int>(sizeof(T)) > word * 4;
        copy_4(to + word * 4, reinterpret_cast<const char*>(from) + (there ? word * 4 : 0),
               there ? 4 : 0);
      }
    } else {
      for (int e = 0; e < kChunk; ++e) reinterpret_cast<T*>(to)[e] = e < valid ? from[e] : T{};
    }
  }
};

// Loads one tile's rows; what is not there becomes 0. `offset` and `there` are those of row lane.
template <class T, int D, class Tile>
VP_DEVICE void fill_tile(char* tile, const T* base, int64_t offset, uint32_t there,
                         int32_t head_dim, int32_t align) {
  constexpr int kChunk = Element<T>::kChunk, kChunks = D / kChunk, kKeys = Tile::kKeys;
  const auto source = [&](int at) {
    const int row = at / kChunks, chunk = at % kChunks;
    const int64_t from_row = __shfl_sync(kWarp, offset, row);
    int valid = (there >> row & 1) ? head_dim - chunk * kChunk : 0;
    valid = valid < 0 ? 0 : valid > kChunk ? kChunk : valid;
    const T* from = valid ? base + from_row + chunk * kChunk : base;
    return ChunkSource<T>{from, tile + row * Tile::kRowBytes + chunk * 16, valid};
  };
  const int lane = threadIdx.x % 32;
  if (align >= 16) {
    // unrolled, the places of all chunks stay in registers: of many, or of a row that is no power
    // of two, they are too many
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
