// SPDX-License-Identifier: Apache-2.0
// Prefetches of K and V while another block is computed.
#pragma once

#include "kernels/cpu/types.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kLine = 64;  // bytes of a cache line

// Into L2: a prefetch into L1 would hold one of its few miss buffers until memory answers.
template <int LINES>
VP_INLINE void prefetch_lines(const void* from) {
  const char* p = static_cast<const char*>(from);
#pragma GCC unroll 8
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(p + i * kLine, 0, 2);
}

// One vector, whole: parts of it would mislead the hardware's prefetcher. The common sizes are
// unrolled.
VP_INLINE void prefetch_vector(const void* vector, int lines) {
  if (lines == 2) return prefetch_lines<2>(vector);
  if (lines == 4) return prefetch_lines<4>(vector);
  if (lines == 8) return prefetch_lines<8>(vector);
  const char* p = static_cast<const char*>(vector);
#pragma GCC unroll 1
  for (int i = 0; i < lines; ++i) prefetch_lines<1>(p + i * kLine);
}

template <class T>
VP_INLINE int lines_of(int dim) {
  return (dim * static_cast<int>(sizeof(T)) + kLine - 1) / kLine;
}

template <class T>
VP_INLINE void prefetch_all(const T* const* vectors, int count, int dim, int64_t offset = 0) {
  for (int i = 0; i < count; ++i) prefetch_vector(vectors[i] + offset, lines_of<T>(dim));
}

// KV heads that are computed together, and the way from one to the next.
struct KvHeads {
  int count;
  int64_t k_stride, v_stride;
};

// Prefetches the vectors of the next block while one is computed. Spread out, because a burst would
// fill the miss buffers and stall.
template <class T>
struct Prefetch {
  const T *const *k, *const *v;
  KvHeads heads;
  int count;      // vectors, K and V together
  int lines;      // of a vector
  int passes;     // calls of `fetch` for each key of the block being computed
  bool by_turns;  // K and V lie in one row, and are fetched by turns; else all K first
  int next, head, due;

  // Without V: v is nullptr.
  VP_INLINE Prefetch make(const T* const* k, const T* const* v, const KvHeads& heads, int keys,
                          int dim, int passes) {
    const bool by_turns = v != nullptr && keys > 0 && v[0] == k[0] + dim;
    const int count = v != nullptr ? 2 * keys : keys;
    return {k, v, heads, count, lines_of<T>(dim), passes, by_turns, 0, 0, 0};
  }

  VP_INLINE void fetch(Prefetch& p, int keys) {
    for (p.due += p.v != nullptr ? 2 * keys : keys; p.due >= p.passes && p.next < p.count;
         p.due -= p.passes) {
      const int half = p.count / 2;
      const bool is_v = p.v != nullptr && (p.by_turns ? p.next % 2 != 0 : p.next >= half);
      const int key = p.v == nullptr ? p.next : p.by_turns ? p.next / 2 : p.next - is_v * half;
      const T* vector =
          is_v ? p.v[key] + p.head * p.heads.v_stride : p.k[key] + p.head * p.heads.k_stride;
      prefetch_vector(vector, p.lines);
      if (++p.head == p.heads.count) p.head = 0, ++p.next;
    }
  }
};

}  // namespace visionpulse::cpu::VP_ISA
