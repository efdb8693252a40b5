// SPDX-License-Identifier: Apache-2.0
// NEON with the dot product of bfloat16 pairs (FEAT_BF16). Caches of 8 bits are read as by NEON.
//
// BFDOT adds two products, which are exact, and then their sum to a lane, and rounds both sums to
// odd: each is off by less than an ulp, where an FMA is off by half of one. A lane takes half as
// many additions as with FMAs, so the bound of a dot product is the same. Numbers below 2^-126
// count as zero, as for AVX-512-BF16. A process that sets FPCR.EBF on a CPU with FEAT_EBF16 gets
// sums rounded to nearest, within the same bound but with other bits; nothing here sets or clears
// it.
#pragma once

#include "kernels/cpu/call.h"
#include "kernels/cpu/simd_neon.h"

namespace visionpulse::cpu::VP_ISA {

#define VP_HAS_PAIR_DOT 1
struct Pairs {
  bfloat16x8_t x;
};
VP_INLINE Pairs pairs_of(uint16x8_t bits) { return {vreinterpretq_bf16_u16(bits)}; }
VP_INLINE Pairs load_pairs(const bf16* p) { return pairs_of(vld1q_u16(&p->bits)); }
VP_INLINE Pairs load_pairs_tail(const bf16* p, int n) {
  bf16 whole[2 * kWidth] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load_pairs(whole);
}
VP_INLINE Vec dot_pairs(Vec acc, Pairs q, Pairs k) { return vbfdotq_f32(acc, q.x, k.x); }
// The pairs (x[i], y[i]) of a unit, in order.
VP_INLINE void interleave(Pairs x, Pairs y, Pairs& a, Pairs& b) {
  const uint16x8_t first = vreinterpretq_u16_bf16(x.x), second = vreinterpretq_u16_bf16(y.x);
  a = pairs_of(vzip1q_u16(first, second));
  b = pairs_of(vzip2q_u16(first, second));
}
VP_INLINE Pairs repeat_pair(const float* pair) {
  return {vreinterpretq_bf16_f32(vld1q_dup_f32(pair))};
}
VP_INLINE Pairs repeat_pair(const bf16* pair) {
  uint32_t bits;
  __builtin_memcpy(&bits, pair, sizeof bits);
  return {vreinterpretq_bf16_u32(vdupq_n_u32(bits))};
}

// The pairs (x[i], y[i]), rounded to bfloat16.
VP_INLINE void store_pairs(float* to, Vec x, Vec y) {
  const uint16x8_t first = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(x));
  const uint16x8_t second = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(y));
  vst1q_f32(to, vreinterpretq_f32_u16(vzip1q_u16(first, second)));
}
// As for AVX-512.
template <int HT>
VP_INLINE void pack_weights(const float* p, int p_stride, int tiles, float* pairs) {
  for (int i = 0; i < tiles; ++i, p += p_stride) {
    for (int lane = 0; lane < kLanes; lane += 2 * kWidth, pairs += kWidth) {
      const Vec x = vload(p + lane), y = vload(p + lane + kWidth);
      if (HT == 4) {
        store_pairs(pairs, x, y);
      } else if (HT == 2) {  // two keys of two heads in a register
        const float64x2_t low = vreinterpretq_f64_f32(x), high = vreinterpretq_f64_f32(y);
        store_pairs(pairs, vreinterpretq_f32_f64(vzip1q_f64(low, high)),
                    vreinterpretq_f32_f64(vzip2q_f64(low, high)));
      } else {
        store_pairs(pairs, vuzp1q_f32(x, y), vuzp2q_f32(x, y));
      }
    }
  }
}
VP_INLINE void pack_neighbours(float* x, int lanes, int keys) {
  float* to = x;
  for (int i = 0; i < keys; i += 2)
    for (int lane = 0; lane < lanes; lane += kWidth, to += kWidth)
      store_pairs(to, vload(x + i * lanes + lane), vload(x + (i + 1) * lanes + lane));
}

}  // namespace visionpulse::cpu::VP_ISA
