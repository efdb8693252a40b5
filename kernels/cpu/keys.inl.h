// SPDX-License-Identifier: Apache-2.0
// Where the K and V vectors of a block of keys lie.
#pragma once

#include "kernels/cpu/call.h"
#include "kernels/cpu/prefetch.inl.h"

namespace visionpulse::cpu::VP_ISA {

// A page id outside the pool makes its keys missing: they read zeros and get no weight.
template <class T>
struct BlockKeys {
  const T* k[kMostKeys];
  const T* v[kMostKeys];
  int32_t position[kMostKeys];  // of a list
  int count;
  bool missing[kMostKeys];
  bool any_missing;
};

alignas(64) static const uint32_t kZeros[kMaxHeadDim] = {};

// `run` keys that follow each other from `slot` of a page on, or of a contiguous cache.
template <class T>
VP_INLINE void locate_run(const CacheArgs& a, const T* k, const T* v, int64_t slot, int at, int run,
                          BlockKeys<T>& keys) {
  k += slot * a.k_stride.token;
  v += slot * a.v_stride.token;
  for (int i = 0; i < run; ++i) {
    keys.k[at + i] = k + i * a.k_stride.token;
    keys.v[at + i] = v + i * a.v_stride.token;
  }
}

// Positions are divided by the page size in the floating-point unit: exact below 2^31, and an
// integer division for every key of a list would show.
struct PageOf {
  double inverse;
  int32_t size;

  VP_INLINE int32_t page(const PageOf& p, int32_t position) {
    return static_cast<int32_t>((position + 0.5) * p.inverse);
  }
};

template <class T>
VP_INLINE void locate_pages(const Call& c, const int32_t* list, int row, int kv_head, int32_t first,
                            BlockKeys<T>& keys) {
  const CacheArgs& a = c.cache;
  const int32_t* table = a.table + row * a.table_stride;
  const T* k = static_cast<const T*>(a.k) + kv_head * a.k_stride.head;
  const T* v = static_cast<const T*>(a.v) + kv_head * a.v_stride.head;
  const T* zeros = reinterpret_cast<const T*>(kZeros);
  const PageOf pages = {1.0 / a.page_size, a.page_size};
  for (int i = 0; i < keys.count;) {
    const int32_t position = list != nullptr ? list[i] : first + i;
    const int32_t number = PageOf::page(pages, position), slot = position - number * a.page_size;
    const int64_t page = table[number];
    int run = list != nullptr ? 1 : a.page_size - slot;
    run = run < keys.count - i ? run : keys.count - i;
    const bool missing = page < 0 || page >= a.pages;
    if (missing) {
      for (int j = 0; j < run; ++j) keys.k[i + j] = keys.v[i + j] = zeros;
    } else {
      locate_run(a, k + page * a.k_stride.outer, v + page * a.v_stride.outer, slot, i, run, keys);
    }
    if (missing != keys.any_missing || missing) {
      // the flags of the block are only read where one is set
      if (!keys.any_missing)
        for (int j = 0; j < i; ++j) keys.missing[j] = false;
      for (int j = 0; j < run; ++j) keys.missing[i + j] = missing;
      keys.any_missing = true;
    }
    i += run;
  }
}

// Past its last key a block names vectors that are there: prefetches need no count.
template <class T>
VP_INLINE void pad(int block, BlockKeys<T>& keys) {
  const T* zeros = reinterpret_cast<const T*>(kZeros);
  for (int i = keys.count; i < block; ++i) keys.k[i] = keys.v[i] = zeros;
}

// The block of a cut that begins at its key `first`, but not beyond `end`.
template <class T>
VP_INLINE void locate(const Call& c, const Cut& cut, int row, int kv_head, int first, int end,
                      int block, BlockKeys<T>& keys) {
  keys.count = end - first < block ? (end > first ? end - first : 0) : block;
  keys.any_missing = false;
  pad(block, keys);
  const int32_t* list = cut.attended != nullptr ? cut.attended + first : nullptr;
  if (list != nullptr)
    for (int i = 0; i < keys.count; ++i) keys.position[i] = list[i];
  const CacheArgs& a = c.cache;
  if (a.table != nullptr) return locate_pages(c, list, row, kv_head, cut.begin + first, keys);
  const T* k = static_cast<const T*>(a.k) + row * a.k_stride.outer + kv_head * a.k_stride.head;
  const T* v = static_cast<const T*>(a.v) + row * a.v_stride.outer + kv_head * a.v_stride.head;
  if (list == nullptr) return locate_run(a, k, v, cut.begin + first, 0, keys.count, keys);
  for (int i = 0; i < keys.count; ++i) {
    keys.k[i] = k + list[i] * a.k_stride.token;
    keys.v[i] = v + list[i] * a.v_stride.token;
  }
}

// Whether the keys of a list's block follow each other, as text does.
template <class T>
VP_INLINE bool follow(const BlockKeys<T>& keys, int block) {
  return keys.count == block && keys.position[block - 1] - keys.position[0] == block - 1;
}

// The vectors to ask for once more beside key i of a block, and beside its value.
template <class T>
VP_INLINE const T* const* soon_keys(const Asked<T>& asked, const BlockKeys<T>& keys, int i) {
  if (asked.v != nullptr) return keys.v + i;
  const int at = i + kSoon<T>;
  return at < keys.count ? keys.k + at : asked.k + (at - keys.count);
}
template <class T>
VP_INLINE const T* const* soon_values(const Asked<T>& asked, const T* const* v, int count, int i) {
  if (asked.k != nullptr) return asked.k + i;
  const int at = i + kSoon<T>;
  return at < count ? v + at : asked.v + (at - count);
}

// From a block's keys of one KV head to those of the next.
template <class T>
VP_INLINE void next_head(const KvHeads& heads, BlockKeys<T>& keys) {
  for (int i = 0; i < keys.count; ++i) {
    if (keys.any_missing && keys.missing[i]) continue;
    keys.k[i] += heads.k_stride;
    keys.v[i] += heads.v_stride;
  }
}

// The share of head `h` in the vectors of a block's tokens, in the order they lie in.
template <class T>
VP_INLINE void share_tokens(const KvHeads& heads, int h, int block, const BlockKeys<T>& keys,
                            BlockKeys<T>& share) {
  for (int i = 0; i < block; ++i) {
    const int at = h * block + i, token = at / heads.count, head = at % heads.count;
    share.k[i] = keys.k[token] + head * heads.k_stride;
    share.v[i] = keys.v[token] + head * heads.v_stride;
  }
}

// Where a part lies in its cut.
struct PartRange {
  int begin, end;
};
VP_INLINE PartRange range_of_part(const Cut& cut, int index) {
  const int begin = index * cut.part_keys;
  return {begin, cut.keys < begin + cut.part_keys ? cut.keys : begin + cut.part_keys};
}

// The blocks of a part in the order they are computed. KV heads whose keys lie in pages of their
// own take turns after each page's stretch of keys, so a page is read whole, in the order it lies
// in.
struct Walk {
  PartRange range;
  int index;          // of the part
  int kv_head, head;  // the first of those that run together, and the block's own, counted from it
  int first;          // key of the block
  int begin, end;     // the stretch

  VP_INLINE Walk of_part(const Call& c, const Cut& cut, int kv_head, int index, int block,
                         const Run& run) {
    const PartRange range = range_of_part(cut, index);
    Walk w = {range, index, kv_head, 0, range.begin, range.begin, range.end};
    if (run.in_pages) w.end = end_of_stretch(c, cut, w, block);
    return w;
  }
  VP_INLINE bool is_done(const Walk& w) { return w.first >= w.range.end; }
  VP_INLINE void step(const Call& c, const Cut& cut, int block, const Run& run, Walk& w) {
    w.first += block;
    if (w.first < w.end || !run.in_pages) return;
    if (++w.head < run.heads) {
      w.first = w.begin;
    } else {
      w.head = 0;
      w.begin = w.first;
      w.end = end_of_stretch(c, cut, w, block);
    }
  }
  // Whole blocks, as far as the page of their first key reaches.
  VP_INLINE int end_of_stretch(const Call& c, const Cut& cut, const Walk& w, int block) {
    const int in_page = c.cache.page_size - (cut.begin + w.begin) % c.cache.page_size;
    const int end = w.begin + (in_page + block - 1) / block * block;
    return end < w.range.end ? end : w.range.end;
  }
  // That of the part which the same thread runs next, if there is one.
  VP_INLINE void enter_next_part(const Call& c, const Cut& cut, int block, const Run& run,
                                 Walk& w) {
    const bool same_head = w.index + 1 < cut.n_parts;
    if (same_head) {
      w = of_part(c, cut, w.kv_head, w.index + 1, block, run);
    } else if (w.kv_head + run.heads < c.G) {
      w = of_part(c, cut, w.kv_head + run.heads, 0, block, run);
    }
  }
};

// The first block of the next part, if the same thread runs it.
template <class T>
VP_INLINE void locate_next_part(const Call& c, const Cut& cut, int row, int kv_head, int index,
                                int block, BlockKeys<T>& keys) {
  const bool same_head = index + 1 < cut.n_parts;
  if (!same_head && kv_head + 1 == c.G) {
    keys.count = 0;
    return pad(block, keys);
  }
  const PartRange range = range_of_part(cut, same_head ? index + 1 : 0);
  locate(c, cut, row, kv_head + (same_head ? 0 : 1), range.begin, range.end, block, keys);
}

}  // namespace visionpulse::cpu::VP_ISA
