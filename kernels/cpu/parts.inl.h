// SPDX-License-Identifier: Apache-2.0
// What a part leaves in memory: statistics and the sum of V of each head.
#pragma once

#include "kernels/cpu/softmax.inl.h"

namespace visionpulse::cpu::VP_ISA {

// In memory [4, padded heads], then [heads, padded D].
struct Part {
  float *m, *l, *text, *visual, *acc;
};

VP_INLINE Part part_at(const Call& c, int64_t index) {
  const int heads = c.part_heads;
  float* p = c.parts + index * c.part_floats;
  return {p, p + heads, p + 2 * heads, p + 3 * heads,
          p + (4 * heads + kLanes - 1) / kLanes * kLanes};
}

VP_INLINE int64_t part_index(const Cut& cut, int kv_head, int part) {
  return cut.first_part + int64_t{kv_head % cut.heads} * cut.n_parts + part;
}

// The parts that hold a row, and the first of its heads in them.
struct RowParts {
  const Cut& cut;
  int count, first_head;
};
VP_INLINE RowParts parts_of_row(const Call& c, int index) {
  const Row& row = c.rows[index];
  const Cut& cut = c.cuts[c.shared ? row.cache_row : index];
  // a query that sees no key has no heads there
  const bool sees = row.visible.begin < row.visible.end;
  return {cut, sees ? cut.n_parts : 0, c.shared ? row.first_head : 0};
}

VP_INLINE void clear(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0.0f;
}

// The sums of V of a part are taken here and stored once: the parts in memory have left the caches
// since the call before.
struct Sums {
  alignas(64) float of[kMaxGroup * kMaxHeadDim];

  VP_INLINE void store(const Sums& sums, int64_t first, int64_t count, const Part& part) {
    for (int64_t i = 0; i < count; i += kWidth) vstore(part.acc + i, vload(sums.of + first + i));
  }
};

// The statistics, summed over the lanes of each head.
template <int HT>
VP_INLINE void store_part(const TileState* tiles, int count, const Part& part) {
  for (int t = 0; t < count; ++t) {
    for (int h = 0; h < HT; ++h) {
      float l = 0.0f, text = 0.0f, visual = 0.0f;
      for (int i = h; i < kLanes; i += HT) {
        l += tiles[t].l[i];
        text += tiles[t].text[i];
        visual += tiles[t].visual[i];
      }
      part.m[t * HT + h] = tiles[t].m[h];
      part.l[t * HT + h] = l;
      part.text[t * HT + h] = text;
      part.visual[t * HT + h] = visual;
    }
  }
}

}  // namespace visionpulse::cpu::VP_ISA
