// SPDX-License-Identifier: Apache-2.0
// The weighted sum of V by AMX, in the place of sum_block.
//
//   sums [heads, 32 columns] = weights [heads, 16 keys] * V [16 keys, 32 columns]
//
// A product takes pairs of neighbours in the rows of both its tiles: of keys here, which V does not
// have side by side. So each weight is one of a pair with zero, once before it and once after it:
//
//   weights, row h      w0 0 w1 0 ..     sums, row h      of the even columns of V
//            row h + 4  0 w0 0 w1 ..          row h + 4   of the odd ones
//
// which takes twice the products of paired keys, and no instruction for V.
#pragma once

#include "kernels/cpu/amx.inl.h"

namespace visionpulse::cpu::VP_ISA {

// From weights p of 4 key tiles of a head tile, `count` of which have keys, to rows of bfloat16:
// [4 heads, 16 keys], each beside a zero that comes after it, and `odd` rows further before it.
VP_INLINE void amx_weights(const float* p, int p_stride, int count, bf16* even, bf16* odd) {
  struct ByHead {
    alignas(64) uint16_t lane[32];
    constexpr ByHead() : lane() {
      for (int i = 0; i < 32; ++i) lane[i] = static_cast<uint16_t>(i % 8 * 4 + i / 8);
    }
  };
  static constexpr ByHead by_head;
  const __m512i order = _mm512_load_si512(by_head.lane);
  __m512i w[2];  // [4 heads, 8 keys]
  for (int i = 0; i < 2; ++i) {
    const Vec low = 2 * i < count ? vload(p + 2 * i * p_stride) : vzero();
    const Vec high = 2 * i + 1 < count ? vload(p + (2 * i + 1) * p_stride) : vzero();
    w[i] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  // [2 heads, 16 keys] each
  const __m512i both = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i a = _mm512_permutex2var_epi64(w[0], both, w[1]);
  const __m512i b = _mm512_permutex2var_epi64(w[0], last, w[1]);
  const __m512i head[4] = {_mm512_cvtepu16_epi32(_mm512_castsi512_si256(a)),
                           _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(a, 1)),
                           _mm512_cvtepu16_epi32(_mm512_castsi512_si256(b)),
                           _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1))};
  for (int h = 0; h < 4; ++h) {
    _mm512_store_si512(even + h * kAmxKeys, head[h]);
    _mm512_store_si512(odd + h * kAmxKeys, _mm512_slli_epi32(head[h], 16));
  }
}

// A vector of V in 8 bits as a row of tiles: first 8 columns of each 16, then the others.
VP_INLINE void stage_value(const f8_as_bf16* from, int dim, bf16* to) {
  int d = 0;
  Pairs a, b;
  for (; d + 2 * kUnit <= dim; d += 2 * kUnit) {
    widen(load_bytes(from + d), a, b);
    _mm512_store_si512(to + d, (__m512i)a.x);
    _mm512_store_si512(to + d + kUnit, (__m512i)b.x);
  }
  if (d == dim) return;
  const __m512i halves = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
  widen(_mm512_permutexvar_epi64(halves, load_bytes(from + d, kUnit)), a, b);
  _mm512_store_si512(to + d, (__m512i)a.x);
}

// Sums of even and of odd columns, in the order of the interleave of values.inl.h.
VP_INLINE void amx_columns(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const __m512i high =
      _mm512_setr_epi32(2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  a = _mm512_permutex2var_ps(even, low, odd);
  b = _mm512_permutex2var_ps(even, high, odd);
}

// Keys of a tile of V that lie anywhere, `columns` of them from column `from` on, side by side.
template <class T>
VP_INLINE void gather_columns(const T* const* v, int from, int columns, bf16* to) {
  for (int i = 0; i < kAmxRows; ++i)
    for (int d = 0; d < columns; d += kUnit)
      _mm512_store_si512(to + i * columns + d, _mm512_loadu_si512(v[i] + from + d));
}

// acc [heads, columns] = acc * rescale + weights * V of up to 64 keys, at most 8 heads. A tile of V
// is 16 keys as they lie: the weights of its even columns are beside zeros, and so are those of its
// odd ones, so no keys have to be paired. Where keys are not evenly spaced (a stride of 0) the tile
// is gathered just before its product, in as little of L1 as can be: the rows of a list stream
// through L1, and what is reused there has to stay.
template <class T, class F, class G>
VP_INLINE void amx_add_rows(const bf16 (*weights)[kAmxRows * kAmxKeys], const AmxRows* v,
                            const T* const* scattered, int tiles, int heads, int padded,
                            int columns, const float* rescale, const F& beside_tile,
                            const G& beside_head, float* acc) {
  alignas(64) bf16 gathered[2][kAmxRows * 2 * kUnit];
  alignas(64) float sums[2][kAmxHeads * kLanes];
  for (int d = 0; d < columns; d += 2 * kUnit) {
    const bool two = d + kUnit < columns;
    amx_fence();
    _tile_zero(6);
    _tile_zero(7);
#pragma GCC unroll 1
    for (int t = 0; t < tiles; ++t) {
      beside_tile();
      const char* from = v[t].first + d * static_cast<int64_t>(sizeof(bf16));
      int64_t stride = v[t].stride;
      if (stride == 0) {
        const int part = two ? 2 * kUnit : kUnit;
        gather_columns(scattered + t * kAmxRows, d, part, gathered[t % 2]);
        from = reinterpret_cast<const char*>(gathered[t % 2]);
        stride = part * static_cast<int64_t>(sizeof(bf16));
        amx_fence();
      }
      _tile_loadd(5, weights[t], kAmxRowBytes);
      _tile_loadd(1, from, stride);
      _tile_dpbf16ps(6, 5, 1);
      if (!two) continue;
      _tile_loadd(2, from + kAmxRowBytes, stride);
      _tile_dpbf16ps(7, 5, 2);
    }
    _tile_stored(6, sums[0], kAmxRowBytes);
    _tile_stored(7, sums[1], kAmxRowBytes);
    amx_fence();
    for (int h = 0; h < heads; ++h) {
      beside_head();
      float* to = acc + h * columns + d;
      const Vec scale = vset(rescale[h]);
      for (int i = 0; i < 1 + two; ++i, to += kUnit) {
        Vec a, b;
        amx_columns(vload(sums[i] + h * kLanes), vload(sums[i] + (padded + h) * kLanes), a, b);
        vstore(to, vfma(vload(to), scale, a));
        vstore(to + kLanes, vfma(vload(to + kLanes), scale, b));
      }
    }
  }
}

template <class T>
VP_INLINE void amx_sum_block(const Call& c, BlockKeys<T>& keys, Asked<T>& asked, const float* x,
                             const Rescales& rescales, float* acc) {
  constexpr int kTiles = 4, kKeys = kTiles * kAmxRows, kHeads = kAmxSumHeads;
  const int group = c.H / c.G, head_tile = head_tiles(group);
  alignas(64) bf16 weights[kTiles][kAmxRows * kAmxKeys];
  alignas(64) bf16 space[sizeof(T) == 1 ? kKeys * kMaxHeadDim : 1];
  float rescale[kAmxHeads];
  for (int h = 0; h < group; ++h) rescale[h] = rescales.tile[h / 4][h % 4];
  const int whole = (keys.count + kAmxRows - 1) / kAmxRows * kAmxRows;
  for (int i = keys.count; i < whole; ++i) keys.v[i] = reinterpret_cast<const T*>(kZeros);
  const int of_columns = (c.D + 2 * kUnit - 1) / (2 * kUnit);
  const int of_heads = (group + kHeads - 1) / kHeads;
  const int each = Asked<T>::beside(asked, Phase::kSums, whole / kAmxRows * of_columns * of_heads);
  const int more =
      Asked<T>::beside(asked, Phase::kOutput, (whole + kKeys - 1) / kKeys * of_columns * group);
  for (int first = 0; first < whole; first += kKeys) {
    const int tiles = (whole - first < kKeys ? whole - first : kKeys) / kAmxRows;
    AmxRows rows[kTiles];
    for (int t = 0; t < tiles; ++t) {
      const T* const* const v = keys.v + first + t * kAmxRows;
      if constexpr (sizeof(T) == sizeof(bf16)) {
        rows[t] = {reinterpret_cast<const char*>(v[0]), amx_spacing(v)};
      } else {
        bf16* const to = space + t * kAmxRows * c.D;
        for (int i = 0; i < kAmxRows; ++i) stage_value(v[i], c.D, to + i * c.D);
        rows[t] = {reinterpret_cast<const char*>(to), c.D * static_cast<int64_t>(sizeof(bf16))};
      }
    }
    const int left = (keys.count - first + 3) / 4;
    for (int head = 0; head < group; head += kHeads) {
      const int heads = group - head < kHeads ? group - head : kHeads;
      const int first_tile = head / 4, of = amx_sum_rows(group) / 8, padded = of * 4;
      for (int t = 0; t < tiles; ++t)
        for (int j = 0; j < of && first_tile + j < head_tile; ++j)
          amx_weights(x + ((first / 4 + t * 4) * head_tile + first_tile + j) * kLanes,
                      head_tile * kLanes, left - t * 4, weights[t] + j * 4 * kAmxKeys,
                      weights[t] + (padded + j * 4) * kAmxKeys);
      amx_add_rows(
          weights, rows, keys.v + first, tiles, heads, padded, c.D, rescale + head,
          [&] { Asked<T>::some(asked, each); }, [&] { Asked<T>::some(asked, more); },
          acc + head * c.D);
    }
    for (int h = 0; h < group; ++h) rescale[h] = 1.0f;
  }
}

#define VP_AMX_BLOCKS(T)                                                                      \
  template <>                                                                                 \
  VP_SPECIALIZED void dot_block<T, 4>(const Query<T>& q, int first_head, BlockKeys<T>& keys,  \
                                      int dim, int tiles_of_heads, const Scaling& scaling,    \
                                      Asked<T>& asked, float* x) {                            \
    amx_dot_block<T>(q, first_head, keys, dim, tiles_of_heads, scaling, asked, x);            \
  }                                                                                           \
  template <>                                                                                 \
  VP_SPECIALIZED void sum_block<T, 4>(const Call& c, BlockKeys<T>& keys, Asked<T>& asked,     \
                                      const float* x, const Rescales& rescales, float* acc) { \
    amx_sum_block<T>(c, keys, asked, x, rescales, acc);                                       \
  }
VP_AMX_BLOCKS(amx_bf16)
VP_AMX_BLOCKS(amx_f8)
#undef VP_AMX_BLOCKS

}  // namespace visionpulse::cpu::VP_ISA
