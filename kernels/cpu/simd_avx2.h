// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/types.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kWidth = 8;
constexpr int kDotVecs = 1;
constexpr int kValueUnits = 1;

using Vec = __m256;

VP_INLINE Vec vzero() { return _mm256_setzero_ps(); }
VP_INLINE Vec vset(float x) { return _mm256_set1_ps(x); }
VP_INLINE Vec vload(const float* p) { return _mm256_loadu_ps(p); }
VP_INLINE void vstore(float* p, Vec x) { _mm256_storeu_ps(p, x); }
VP_INLINE Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
VP_INLINE Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
VP_INLINE Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
VP_INLINE Vec vdiv(Vec a, Vec b) { return _mm256_div_ps(a, b); }
VP_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
VP_INLINE Vec vmax_number(Vec x, Vec so_far) { return _mm256_max_ps(x, so_far); }
VP_INLINE Vec vround(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VP_INLINE Vec vabs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
VP_INLINE Vec vcopysign(Vec size, Vec sign) {
  const Vec bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, size), _mm256_and_ps(bit, sign));
}
VP_INLINE Vec vless(Vec a, Vec b, Vec then, Vec otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
VP_INLINE bool vany_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
VP_INLINE Vec vscale(Vec x, Vec p, Vec n) {
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const Vec scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ), scaled);
}
VP_INLINE Vec vand_bits(Vec x, const uint32_t* mask) {
  return _mm256_and_ps(x, _mm256_loadu_ps(reinterpret_cast<const float*>(mask)));
}

VP_INLINE Vec vreduce(const Vec* acc) {
  const Vec a = _mm256_hadd_ps(_mm256_hadd_ps(acc[0], acc[1]), _mm256_hadd_ps(acc[2], acc[3]));
  const Vec b = _mm256_hadd_ps(_mm256_hadd_ps(acc[4], acc[5]), _mm256_hadd_ps(acc[6], acc[7]));
  return vadd(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

VP_INLINE void load_unit(const float* p, Vec& a, Vec& b) {
  a = _mm256_loadu_ps(p);
  b = _mm256_loadu_ps(p + 8);
}
VP_INLINE void load_unit(const bf16* p, Vec& a, Vec& b) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  b = _mm256_castsi256_ps(
      _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
VP_INLINE void load_unit(const f16* p, Vec& a, Vec& b) {
  a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
// As for AVX-512.
VP_INLINE void load_unit(const f8* p, Vec& a, Vec& b) {
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i moved = _mm256_and_si256(_mm256_slli_epi16(words, 7),
                                         _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __m256i carry =
      _mm256_and_si256(_mm256_add_epi16(moved, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
  const __m256i halves = _mm256_or_si256(moved, carry);
  a = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  b = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

}  // namespace visionpulse::cpu::VP_ISA

#include "kernels/cpu/simd_plain.h"
