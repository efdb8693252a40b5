// SPDX-License-Identifier: Apache-2.0
// Where the K and V vectors of a block of keys lie.
#pragma once

#include "kernels/cpu/call.h"
#include "kernels/cpu/prefetch.inl.h"

namespace visionpulse::cpu::VP_ISA {

// A page id outside the pool makes its keys missing: they read zeros and get no weight.
template <class T>
struct BlockKeys {
  const T* k[kListBlock];
  const T* v[kListBlock];
  int32_t position[kListBlock];
  int count;
  bool missing[kListBlock];
  bool any_missing;
  bool adjacent;  // K vectors, and V vectors, follow each other in whole cache lines
};

alignas(64) static const uint32_t kZeros[kMaxHeadDim] = {};

template <class T>
VP_INLINE void locate_pages(const Call& c, int row, int kv_head, BlockKeys<T>& keys) {
  const CacheArgs& a = c.cache;
  const int32_t* table = a.table + row * a.table_stride;
  const T* k = static_cast<const T*>(a.k) + kv_head * a.k_stride.head;
  const T* v = static_cast<const T*>(a.v) + kv_head * a.v_stride.head;
  int32_t previous = -2, slot = 0, page = 0;
  for (int i = 0; i < keys.count; ++i) {
    const int32_t n = keys.position[i];
    // a division for every key would show, and neighbours share their page
    if (n == previous + 1 && slot + 1 < a.page_size) {
      ++slot;
    } else {
      page = table[n / a.page_size];
      slot = n % a.page_size;
    }
    previous = n;
    keys.missing[i] = page < 0 || page >= a.pages;
    keys.any_missing |= keys.missing[i];
    const T* zeros = reinterpret_cast<const T*>(kZeros);
    keys.k[i] = keys.missing[i] ? zeros : k + page * a.k_stride.outer + slot * a.k_stride.token;
    keys.v[i] = keys.missing[i] ? zeros : v + page * a.v_stride.outer + slot * a.v_stride.token;
  }
}

// Keys of a block. A block of a stream has the same bytes in every type.
template <class T>
VP_INLINE int block_keys(const Cut& cut) {
  return cut.attended != nullptr ? kListBlock : kBlock * 2 / static_cast<int>(sizeof(T));
}

// The block of a cut that begins at its key `first`, but not beyond `end`.
template <class T>
VP_INLINE void locate(const Call& c, const Cut& cut, int row, int kv_head, int first, int end,
                      BlockKeys<T>& keys) {
  const int block = block_keys<T>(cut);
  keys.count = end - first < block ? (end > first ? end - first : 0) : block;
  keys.any_missing = keys.adjacent = false;
  if (cut.attended != nullptr) {
    for (int i = 0; i < keys.count; ++i) keys.position[i] = cut.attended[first + i];
  } else {
    for (int i = 0; i < keys.count; ++i) keys.position[i] = cut.begin + first + i;
  }
  const CacheArgs& a = c.cache;
  if (a.table != nullptr) return locate_pages(c, row, kv_head, keys);
  keys.adjacent = cut.attended == nullptr && a.k_stride.token == c.D && a.v_stride.token == c.D &&
                  c.D * sizeof(T) % kLine == 0;
  const T* k = static_cast<const T*>(a.k) + row * a.k_stride.outer + kv_head * a.k_stride.head;
  const T* v = static_cast<const T*>(a.v) + row * a.v_stride.outer + kv_head * a.v_stride.head;
  for (int i = 0; i < keys.count; ++i) {
    keys.k[i] = k + keys.position[i] * a.k_stride.token;
    keys.v[i] = v + keys.position[i] * a.v_stride.token;
  }
}

}  // namespace visionpulse::cpu::VP_ISA
