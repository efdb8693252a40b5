// SPDX-License-Identifier: Apache-2.0
// Prefetches of K and V while another block is computed.
#pragma once

#include "kernels/cpu/types.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kLine = 64;  // bytes of a cache line

// Stays rolled: unrolled, or nested in a loop over vectors, it costs a tenth of the bandwidth.
VP_INLINE void prefetch_stream(const void* from, int lines) {
  const char* p = static_cast<const char*>(from);
#pragma GCC unroll 1
  for (int i = 0; i < lines; ++i) __builtin_prefetch(p + i * kLine, 0, 3);
}

template <int LINES>
VP_INLINE void prefetch_lines(const void* from) {
  const char* p = static_cast<const char*>(from);
#pragma GCC unroll 8
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(p + i * kLine, 0, 3);
}

// A vector that lies by itself. The common sizes are unrolled.
VP_INLINE void prefetch_vector(const void* vector, int lines) {
  if (lines == 4) return prefetch_lines<4>(vector);
  if (lines == 8) return prefetch_lines<8>(vector);
  prefetch_stream(vector, lines);
}

template <class T>
VP_INLINE void prefetch_all(const T* const* vectors, int count, int dim) {
  const int lines = (dim * static_cast<int>(sizeof(T)) + kLine - 1) / kLine;
  for (int i = 0; i < count; ++i) prefetch_vector(vectors[i], lines);
}

// Prefetches the K or V vectors of a block while another is computed, in memory order. Spread out,
// because a burst would fill the miss buffers and stall. Scattered vectors are fetched whole,
// because parts of them mislead the hardware's prefetcher.
template <class T>
struct Prefetch {
  const T* const* vectors;
  int count;      // vectors
  int lines;      // of a vector
  int step;       // lines to fetch for each key of a value tile
  bool adjacent;  // each vector begins where the one before ends
  int next, next_line;

  // `tiles`: value tiles that pass over the block being computed.
  VP_INLINE Prefetch make(const T* const* vectors, int count, bool adjacent, int dim, int tiles) {
    const int lines = (dim * static_cast<int>(sizeof(T)) + kLine - 1) / kLine;
    return {vectors, count, lines, (lines + tiles - 1) / tiles, adjacent, 0, 0};
  }

  // The vectors [first, end).
  VP_INLINE void fetch_range(const Prefetch& p, int first, int end) {
    end = end < p.count ? end : p.count;
    if (first >= end) return;
    if (p.adjacent) return prefetch_stream(p.vectors[first], (end - first) * p.lines);
    for (int i = first; i < end; ++i) prefetch_vector(p.vectors[i], p.lines);
  }

  // One step of adjacent vectors.
  VP_INLINE void fetch_step(Prefetch& p) {
    if (p.next == p.count) return;
    prefetch_stream(reinterpret_cast<const char*>(p.vectors[p.next]) + p.next_line * kLine, p.step);
    p.next_line += p.step;
    if (p.next_line < p.lines) return;
    p.next_line = 0;
    ++p.next;
  }

  // The whole vectors that `keys` steps complete.
  VP_INLINE void fetch_scattered(Prefetch& p, int keys) {
    for (p.next_line += keys * p.step; p.next_line >= p.lines && p.next < p.count;
         p.next_line -= p.lines)
      prefetch_vector(p.vectors[p.next++], p.lines);
  }
};

}  // namespace visionpulse::cpu::VP_ISA
