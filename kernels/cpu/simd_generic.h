// SPDX-License-Identifier: Apache-2.0
// Four floats at a time with the compiler's own vectors: any little-endian CPU.
#pragma once

#include "kernels/cpu/types.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kWidth = 4;
constexpr int kDotVecs = 2;
constexpr int kValueUnits = 1;

using Vec = float __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));

VP_INLINE Vec vset(float x) { return Vec{x, x, x, x}; }
VP_INLINE Vec vzero() { return vset(0.0f); }
VP_INLINE Vec vload(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
VP_INLINE void vstore(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
VP_INLINE Vec vadd(Vec a, Vec b) { return a + b; }
VP_INLINE Vec vsub(Vec a, Vec b) { return a - b; }
VP_INLINE Vec vmul(Vec a, Vec b) { return a * b; }
VP_INLINE Vec vdiv(Vec a, Vec b) { return a / b; }
VP_INLINE Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
VP_INLINE Vec blend(Bits mask, Vec then, Vec otherwise) {
  return (Vec)((mask & (Bits)then) | (~mask & (Bits)otherwise));
}
VP_INLINE Vec vmax_number(Vec x, Vec so_far) { return blend((Bits)(x > so_far), x, so_far); }
VP_INLINE Vec vround(Vec x) {
  // adding 1.5 * 2^23 leaves no fraction. Exact for |x| < 2^22; beyond that vscale gives 0
  const Vec magic = vset(12582912.0f);
  return (x + magic) - magic;
}
VP_INLINE Vec vabs(Vec x) { return (Vec)((Bits)x & 0x7fffffffu); }
VP_INLINE Vec vcopysign(Vec size, Vec sign) {
  return (Vec)(((Bits)size & 0x7fffffffu) | ((Bits)sign & 0x80000000u));
}
VP_INLINE Vec vless(Vec a, Vec b, Vec then, Vec otherwise) {
  return blend((Bits)(a < b), then, otherwise);
}
VP_INLINE bool vany_greater(Vec a, Vec b) {
  const Bits greater = (Bits)(a > b);
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}
VP_INLINE Vec vscale(Vec x, Vec p, Vec n) {
  const Vec magic = vset(12582912.0f);
  const Bits power = ((Bits)(n + magic) - (Bits)magic + 127u) << 23;
  // a product, so a NaN in p stays NaN whatever the power is
  return (Vec)(~(Bits)(x < vset(-126.0f)) & (Bits)(p * (Vec)power));
}
VP_INLINE Vec vand_bits(Vec x, const uint32_t* mask) {
  Bits m;
  __builtin_memcpy(&m, mask, sizeof m);
  return (Vec)((Bits)x & m);
}

VP_INLINE Vec vreduce(const Vec* acc) {
  Vec sums = vzero();
  for (int i = 0; i < 4; ++i) sums[i] = (acc[i][0] + acc[i][2]) + (acc[i][1] + acc[i][3]);
  return sums;
}

// Exact for every half, subnormals and infinities included.
VP_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  const uint32_t exponent = rest >> 10;
  uint32_t bits = (rest << 13) + (exponent == 0x1f ? 0x70000000u : 0x38000000u);
  float value;
  if (exponent == 0) {
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    __builtin_memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

VP_INLINE void load_unit(const float* p, Vec& a, Vec& b) {
  a = vload(p);
  b = vload(p + 4);
}
VP_INLINE void load_unit(const bf16* p, Vec& a, Vec& b) {
  Bits pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  a = (Vec)(pairs << 16);
  b = (Vec)(pairs & 0xffff0000u);
}
VP_INLINE void load_unit(const f16* p, Vec& a, Vec& b) {
  for (int i = 0; i < 4; ++i) {
    a[i] = half_to_float(p[i].bits);
    b[i] = half_to_float(p[4 + i].bits);
  }
}
// As for AVX-512.
VP_INLINE uint16_t half_of(f8 x) {
  const uint32_t moved = (x.bits & 0x80u) << 8 | (x.bits & 0x7fu) << 7;
  return static_cast<uint16_t>(moved | ((moved + 0x80u) & 0x4000u));
}
VP_INLINE void load_unit(const f8* p, Vec& a, Vec& b) {
  for (int i = 0; i < 4; ++i) {
    a[i] = half_to_float(half_of(p[i]));
    b[i] = half_to_float(half_of(p[4 + i]));
  }
}

}  // namespace visionpulse::cpu::VP_ISA

#include "kernels/cpu/simd_plain.h"
