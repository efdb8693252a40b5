// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, BW, DQ, VL), and with VP_NATIVE_BF16 the dot product of bfloat16 pairs and tables of
// bytes (VBMI). The comments hold for the functions of the same name in every simd file.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/types.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kWidth = 16;      // floats in a register
constexpr int kDotVecs = 1;     // registers of logits in one dot tile
constexpr int kValueUnits = 2;  // units of 2 * kWidth columns in one value tile

using Vec = __m512;

VP_INLINE Vec vzero() { return _mm512_setzero_ps(); }
VP_INLINE Vec vset(float x) { return _mm512_set1_ps(x); }
VP_INLINE Vec vload(const float* p) { return _mm512_loadu_ps(p); }
VP_INLINE void vstore(float* p, Vec x) { _mm512_storeu_ps(p, x); }
// Where kStreams: past the caches, to a whole line of memory, which is not read before. Other
// threads see it after vstream_end.
#if defined(VP_ASKS_BY_PAGES)
constexpr bool kStreams = true;
VP_INLINE void vstream(float* p, Vec x) { _mm512_stream_ps(p, x); }
VP_INLINE void vstream_end() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
VP_INLINE void vstream(float* p, Vec x) { vstore(p, x); }
VP_INLINE void vstream_end() {}
#endif
VP_INLINE Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
VP_INLINE Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
VP_INLINE Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
VP_INLINE Vec vdiv(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// a * b + c
VP_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The larger; `so_far` where x is NaN.
VP_INLINE Vec vmax_number(Vec x, Vec so_far) { return _mm512_max_ps(x, so_far); }
VP_INLINE Vec vround(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
VP_INLINE Vec vabs(Vec x) { return _mm512_abs_ps(x); }
VP_INLINE Vec vcopysign(Vec size, Vec sign) {
  const __m512i bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(size), 0xca));
}
VP_INLINE Vec vless(Vec a, Vec b, Vec then, Vec otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
}
// Whether a > b in any lane.
VP_INLINE bool vany_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
// p * 2^n, or 0 where x < -126; a NaN stays NaN.
VP_INLINE Vec vscale(Vec x, Vec p, Vec n) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, n);
}
VP_INLINE Vec vand_bits(Vec x, const uint32_t* mask) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_loadu_si512(mask)));
}

// Lane i is the sum of acc[i], by the same tree for every i, so equal keys get equal logits
// wherever they lie in a tile.
VP_INLINE Vec vreduce(const Vec* acc) {
  Vec quad[4];
  for (int i = 0; i < 4; ++i) {
    const Vec* a = acc + 4 * i;
    const Vec lo = vadd(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const Vec hi = vadd(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512d x = _mm512_castps_pd(lo), y = _mm512_castps_pd(hi);
    quad[i] = vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                   _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const Vec a = vadd(_mm512_shuffle_f32x4(quad[0], quad[1], 0x44),
                     _mm512_shuffle_f32x4(quad[0], quad[1], 0xee));
  const Vec b = vadd(_mm512_shuffle_f32x4(quad[2], quad[3], 0x44),
                     _mm512_shuffle_f32x4(quad[2], quad[3], 0xee));
  return vadd(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Gives the lanes i, i + HT, i + 2 HT, ... their maximum.
#define VP_HAS_SPREAD_MAX 1
template <int HT>
VP_INLINE Vec vspread_max(Vec x) {
  x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  if (HT <= 2) x = _mm512_max_ps(x, _mm512_permute_ps(x, 0x4e));
  if (HT == 1) x = _mm512_max_ps(x, _mm512_permute_ps(x, 0xb1));
  return x;
}

// A unit is 2 * kWidth elements in two registers. Their order depends on the type (bfloat16: even
// elements, then odd ones); q, K and the sums of V share it.
VP_INLINE void load_unit(const float* p, Vec& a, Vec& b) {
  a = _mm512_loadu_ps(p);
  b = _mm512_loadu_ps(p + 16);
}
VP_INLINE void split_pairs(__m512i pairs, Vec& a, Vec& b) {
  a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  b = _mm512_castsi512_ps(
      _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
VP_INLINE void load_unit(const bf16* p, Vec& a, Vec& b) {
  split_pairs(_mm512_loadu_si512(p), a, b);
}
VP_INLINE void load_unit(const f16* p, Vec& a, Vec& b) {
  a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
// The bits of exponent and fraction become a half's; NaN, all ones, carries into the bit that makes
// it one of a half. Subnormal numbers stay exact.
VP_INLINE void widen(__m256i bytes, Vec& a, Vec& b) {
  const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7),
                                         _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __m512i carried = _mm512_add_epi16(moved, _mm512_set1_epi16(0x80));
  const __m512i halves =
      _mm512_ternarylogic_epi32(moved, carried, _mm512_set1_epi16(0x4000), 0xf8);  // a | b & c
  a = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}
VP_INLINE void load_unit(const f8* p, Vec& a, Vec& b) {
  widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), a, b);
}

// The first n elements of a unit, then zeros. Reads no byte past the elements.
VP_INLINE void load_tail(const float* p, int n, Vec& a, Vec& b) {
  const uint32_t mask = (1u << n) - 1;
  a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask & 0xffff), p);
  b = mask >> 16 ? _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16) : vzero();
}
VP_INLINE __m512i load_tail_pairs(const void* p, int n) {
  return _mm512_maskz_loadu_epi16((1u << n) - 1, p);
}
VP_INLINE void load_tail(const bf16* p, int n, Vec& a, Vec& b) {
  split_pairs(load_tail_pairs(p, n), a, b);
}
VP_INLINE void load_tail(const f16* p, int n, Vec& a, Vec& b) {
  const __m512i halves = load_tail_pairs(p, n);
  a = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}
VP_INLINE void load_tail(const f8* p, int n, Vec& a, Vec& b) {
  widen(_mm256_maskz_loadu_epi8((1u << n) - 1, p), a, b);
}

#if defined(VP_NATIVE_BF16)
#define VP_HAS_PAIR_DOT 1
#define VP_HAS_PAIR_BYTES 1  // and 8-bit floats become pairs
struct Pairs {
  __m512bh x;
};
// Lanes of two tiles in the order of pack_weights.
template <int HT>
struct Neighbours {
  alignas(64) uint16_t lane[32];
  constexpr Neighbours() : lane() {
    for (int i = 0; i < 32; ++i)
      lane[i] = static_cast<uint16_t>((i / 2 / HT * 2 + i % 2) * HT + i / 2 % HT);
  }
};
VP_INLINE Pairs load_pairs(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
VP_INLINE Pairs load_pairs_tail(const bf16* p, int n) { return {(__m512bh)load_tail_pairs(p, n)}; }
// The bfloat16 of each e4m3 without its sign: every one is exact, and none is subnormal, which a
// product of pairs would take for zero.
struct Float8Bytes {
  alignas(64) uint8_t high[128], low[128];
  constexpr Float8Bytes() : high(), low() {
    for (int i = 0; i < 128; ++i) {
      int exponent = 120 + (i >> 3), fraction = i & 7;
      if (i < 8) ++exponent;
      for (; i != 0 && i < 8 && fraction < 8; --exponent) fraction *= 2;
      const int bits = i == 0 ? 0 : i == 127 ? 0x7fc0 : (exponent << 7) + (fraction % 8 << 4);
      high[i] = static_cast<uint8_t>(bits >> 8);
      low[i] = static_cast<uint8_t>(bits & 0xff);
    }
  }
};
// Of each 16 bytes the first 8 to a, the others to b.
VP_INLINE void widen(__m512i bytes, Pairs& a, Pairs& b) {
  static constexpr Float8Bytes table;
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), bytes,
                                               _mm512_load_si512(table.low + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table.high), bytes,
                                                _mm512_load_si512(table.high + 64));
  // not one operation of three operands, which has to wait for products of pairs on some CPUs
  const __m512i with_sign =
      _mm512_add_epi8(high, _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80))));
  a.x = (__m512bh)_mm512_unpacklo_epi8(low, with_sign);
  b.x = (__m512bh)_mm512_unpackhi_epi8(low, with_sign);
}
VP_INLINE __m512i load_bytes(const f8_as_bf16* p) { return _mm512_loadu_si512(p); }
// The first n of 64, then zeros.
VP_INLINE __m512i load_bytes(const f8_as_bf16* p, int n) {
  return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - n), p);
}
VP_INLINE Vec dot_pairs(Vec acc, Pairs q, Pairs k) { return _mm512_dpbf16_ps(acc, q.x, k.x); }
// The pairs (x[i], y[i]) of a unit: of columns 0 to 3 of each 8, then of columns 4 to 7.
VP_INLINE void interleave(Pairs x, Pairs y, Pairs& a, Pairs& b) {
  a.x = (__m512bh)_mm512_unpacklo_epi16((__m512i)x.x, (__m512i)y.x);
  b.x = (__m512bh)_mm512_unpackhi_epi16((__m512i)x.x, (__m512i)y.x);
}
// The pairs of 64 columns of two keys: of columns 0 to 3 of each 16, of columns 4 to 7, ...
VP_INLINE void interleave(__m512i x, __m512i y, Pairs* pairs /* [4] */) {
  widen(_mm512_unpacklo_epi8(x, y), pairs[0], pairs[1]);
  widen(_mm512_unpackhi_epi8(x, y), pairs[2], pairs[3]);
}
// Of the first 32 columns, in the order of the interleave of bfloat16.
VP_INLINE void interleave(__m512i x, __m512i y, Pairs& a, Pairs& b) {
  const __m512i even = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(x));
  const __m512i odd = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(y));
  widen(_mm512_or_si512(even, _mm512_slli_epi16(odd, 8)), a, b);
}
// As an integer: to broadcast a float from memory takes a shuffle on some CPUs.
VP_INLINE Pairs repeat_pair(const void* pair) {
  int bits;
  __builtin_memcpy(&bits, pair, sizeof bits);
  return {(__m512bh)_mm512_set1_epi32(bits)};
}
// From weights p [tiles, 16 lanes], lane = key * HT + head, to bfloat16 pairs of neighbouring keys
// [tiles, 8], each with its head at key / 2 * HT + head.
template <int HT>
VP_INLINE void pack_weights(const float* p, int p_stride, int tiles, float* pairs) {
  static constexpr Neighbours<HT> neighbours;
  const __m512i order = _mm512_load_si512(neighbours.lane);
  for (int i = 0; i < tiles; i += 2) {
    const Vec low = vload(p + i * p_stride);
    const Vec high = i + 1 < tiles ? vload(p + (i + 1) * p_stride) : vzero();
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_store_si512(pairs + i * 8, _mm512_permutexvar_epi16(order, rounded));
  }
}
// The same in place from x [keys, lanes], lane = head, of an even number of keys, to [keys / 2,
// lanes].
VP_INLINE void pack_neighbours(float* x, int lanes, int keys) {
  pack_weights<kWidth>(x, lanes, keys, x);
}
#endif

// Writes the position of each code above the pivot and of the first `ties` equal to it. Returns how
// many.
VP_INLINE int write_kept(const uint32_t* codes, const int32_t* positions, int n, uint32_t pivot,
                         int ties, int32_t* out) {
  const __m512i target = _mm512_set1_epi32(static_cast<int>(pivot));
  int written = 0;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 in = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
    const __m512i code = _mm512_maskz_loadu_epi32(in, codes + i);
    uint32_t kept = _mm512_mask_cmpgt_epu32_mask(in, code, target);
    uint32_t equal = ties > 0 ? _mm512_mask_cmpeq_epu32_mask(in, code, target) : 0;
    for (; equal != 0 && ties > 0; equal &= equal - 1, --ties) kept |= equal & (0u - equal);
    const int count = __builtin_popcount(kept);
    // compressed in a register: compressing stores are microcoded on some CPUs
    _mm512_mask_storeu_epi32(
        out + written, static_cast<__mmask16>((1u << count) - 1),
        _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept),
                                    _mm512_maskz_loadu_epi32(in, positions + i)));
    written += count;
  }
  return written;
}

// Copies the bits of the scores that are at least `least`, and their positions from `base` on.
// Both have space for n + 16. Returns how many.
VP_INLINE int filter_scores(const float* scores, int n, int32_t base, float least, uint32_t* bits,
                            int32_t* positions) {
  const Vec low = vset(least);
  __m512i at =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(base));
  int found = 0;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 in = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
    const Vec score = _mm512_maskz_loadu_ps(in, scores + i);
    const __mmask16 kept = _mm512_mask_cmp_ps_mask(in, score, low, _CMP_GE_OQ);
    _mm512_storeu_ps(bits + found, _mm512_maskz_compress_ps(kept, score));
    _mm512_storeu_si512(positions + found, _mm512_maskz_compress_epi32(kept, at));
    at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    found += __builtin_popcount(kept);
  }
  return found;
}

}  // namespace visionpulse::cpu::VP_ISA
