// SPDX-License-Identifier: Apache-2.0
// The parts of a row made one, in a fixed order, and rounded to the output.
#pragma once

#include "kernels/common/float_bits.h"
#include "kernels/cpu/dot.inl.h"
#include "kernels/cpu/parts.inl.h"

namespace visionpulse::cpu::VP_ISA {

// Where the sums hold column d of V: in the order in which Weigh loads it.
VP_INLINE int column_of(const void*, int d, int) { return d; }
VP_INLINE int column_of(const bf16*, int d, int) {
  const int within = d % kUnit, unit = d - within;
#if defined(VP_HAS_PAIR_DOT)
  return unit + within / 4 % 2 * kWidth + within / 8 * 4 + within % 4;
#else
  return unit + within % 2 * kWidth + within / 2;
#endif
}
VP_INLINE int column_of(const f8_as_bf16*, int d, int dim) {
  constexpr int kColumns = 2 * kUnit;
  const int within = d % kColumns, first = d - within;
  if (first + kColumns > dim) return column_of(static_cast<const bf16*>(nullptr), d, dim);
  return first + within / 4 % 4 * kWidth + within / 16 * 4 + within % 4;
}

// Round to nearest even; overflow becomes infinity, and subnormals are exact.
VP_INLINE void store_as(float* to, float x) { *to = x; }
VP_INLINE void store_as(bf16* to, float x) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
VP_INLINE void store_as(f16* to, float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;
  } else if (size >= 0x477ff000u) {  // 65520, halfway to 2^16
    half = 0x7c00u;
  } else if (size < 0x38800000u) {  // 2^-14: adding 1/2 leaves the subnormal's bits at the bottom
    float shifted;
    __builtin_memcpy(&shifted, &size, sizeof shifted);
    half = float_bits(shifted + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
}

// T is the type of the output, K that of V.
template <class T, class K>
static void merge_parts(const Call& c, int row, int kv_head) {
  const RowParts parts = parts_of_row(c, row);
  const int group = c.H / c.G, columns = padded_dim(c.D, kUnit);
  const int64_t first = part_index(parts.cut, kv_head, 0);
  T* const of_query = static_cast<T*>(c.out) + c.rows[row].cache_row * c.out_stride.row +
                      c.rows[row].query * c.queries.out_stride;
  for (int i = 0; i < group; ++i) {
    T* out = of_query + (int64_t{kv_head} * group + i) * c.out_stride.head;
    const int h = parts.first_head + i;
    float m = minus_infinity(), l = 0.0f;
    for (int s = 0; s < parts.count; ++s) {
      const float part_m = part_at(c, first + s).m[h];
      m = part_m > m ? part_m : m;
    }
    alignas(64) float sum[kMaxHeadDim + kUnit];
    clear(sum, columns);
    for (int s = 0; s < parts.count; ++s) {
      const Part part = part_at(c, first + s);
      const float w = exp2_scalar(rescale_exponent(part.m[h], m));
      l += w * part.l[h];
      for (int d = 0; d < columns; d += kWidth)
        vstore(sum + d, vfma(vset(w), vload(part.acc + h * columns + d), vload(sum + d)));
    }
    // no key, or none with a finite logit: zeros
    const float inverse =
        m == minus_infinity() && l == 0.0f ? 0.0f : factor_of<K>(c.cache.v_scale, kv_head) / l;
    const K* const stored = nullptr;
    float in_order[kMaxHeadDim];
    for (int d = 0; d < c.D; ++d) in_order[d] = sum[column_of(stored, d, c.D)] * inverse;
    for (int d = 0; d < c.D; ++d) store_as(out + d, in_order[d]);
  }
}

}  // namespace visionpulse::cpu::VP_ISA
