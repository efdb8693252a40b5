// SPDX-License-Identifier: Apache-2.0
// NEON of 64-bit Arm.
#pragma once

#include <arm_neon.h>

#include "kernels/cpu/types.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kWidth = 4;
constexpr int kDotVecs = 4;
constexpr int kValueUnits = 2;

using Vec = float32x4_t;

VP_INLINE Vec vzero() { return vdupq_n_f32(0.0f); }
VP_INLINE Vec vset(float x) { return vdupq_n_f32(x); }
VP_INLINE Vec vload(const float* p) { return vld1q_f32(p); }
VP_INLINE void vstore(float* p, Vec x) { vst1q_f32(p, x); }
VP_INLINE Vec vadd(Vec a, Vec b) { return vaddq_f32(a, b); }
VP_INLINE Vec vsub(Vec a, Vec b) { return vsubq_f32(a, b); }
VP_INLINE Vec vmul(Vec a, Vec b) { return vmulq_f32(a, b); }
VP_INLINE Vec vdiv(Vec a, Vec b) { return vdivq_f32(a, b); }
VP_INLINE Vec vfma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
VP_INLINE Vec vmax_number(Vec x, Vec so_far) { return vbslq_f32(vcgtq_f32(x, so_far), x, so_far); }
VP_INLINE Vec vround(Vec x) { return vrndnq_f32(x); }
VP_INLINE Vec vabs(Vec x) { return vabsq_f32(x); }
VP_INLINE Vec vcopysign(Vec size, Vec sign) {
  return vbslq_f32(vdupq_n_u32(0x80000000u), sign, size);
}
VP_INLINE Vec vless(Vec a, Vec b, Vec then, Vec otherwise) {
  return vbslq_f32(vcltq_f32(a, b), then, otherwise);
}
VP_INLINE bool vany_greater(Vec a, Vec b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }
VP_INLINE Vec vscale(Vec x, Vec p, Vec n) {
  const int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(n), 23);
  const uint32x4_t scaled = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
  const uint32x4_t vanished = vcltq_f32(x, vdupq_n_f32(-126.0f));
  return vreinterpretq_f32_u32(vbicq_u32(scaled, vanished));
}
VP_INLINE Vec vand_bits(Vec x, const uint32_t* mask) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vld1q_u32(mask)));
}

VP_INLINE Vec vreduce(const Vec* acc) {
  return vpaddq_f32(vpaddq_f32(acc[0], acc[1]), vpaddq_f32(acc[2], acc[3]));
}

VP_INLINE void load_unit(const float* p, Vec& a, Vec& b) {
  a = vld1q_f32(p);
  b = vld1q_f32(p + 4);
}
VP_INLINE void load_unit(const bf16* p, Vec& a, Vec& b) {
  const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  a = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
  b = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
}
VP_INLINE void load_unit(const f16* p, Vec& a, Vec& b) {
  const uint16x8_t halves = vld1q_u16(&p->bits);
  a = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves)));
  b = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves)));
}
// As for AVX-512.
VP_INLINE void load_unit(const f8* p, Vec& a, Vec& b) {
  const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(vld1_u8(&p->bits)));
  const uint16x8_t moved =
      vandq_u16(vreinterpretq_u16_s16(vshlq_n_s16(words, 7)), vdupq_n_u16(0xbfff));
  const uint16x8_t carry = vandq_u16(vaddq_u16(moved, vdupq_n_u16(0x80)), vdupq_n_u16(0x4000));
  const uint16x8_t halves = vorrq_u16(moved, carry);
  a = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves)));
  b = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves)));
}

}  // namespace visionpulse::cpu::VP_ISA

#include "kernels/cpu/simd_plain.h"
