// SPDX-License-Identifier: Apache-2.0
// Q K^T in bfloat16 by AMX, in the place of dot_block, and what both products share.
//
//   logits [16 keys, heads]     = K [16 keys, 32 columns]   * Q [16 pairs of columns, heads]
//
// K and V in bfloat16 are loaded where they lie if their keys are evenly spaced, else from a copy
// in L1. 8 bits are widened on the way to L1. The logits of a key come from the same instructions
// wherever it lies, and so do the sums of a head.
#pragma once

#include "kernels/cpu/shared_stream.inl.h"
#include "kernels/cpu/stream.inl.h"

// A specialization of a static template, which cannot repeat `static`.
#define VP_SPECIALIZED inline __attribute__((always_inline))

namespace visionpulse::cpu {

// Where the CPU multiplies them in tiles.
struct amx_bf16 : bf16 {};
struct amx_f8 : f8_as_bf16 {};

}  // namespace visionpulse::cpu

namespace visionpulse::cpu::VP_ISA {

constexpr int kAmxRows = 16, kAmxRowBytes = 64;  // of a tile register
constexpr int kAmxHeads = 16;                    // most heads of a tile
constexpr int kAmxKeys = 32;                     // keys of one product with weights
constexpr int kAmxColumns = 32;                  // columns of one product of q and K
static_assert(kListBlock % kAmxKeys == 0 && kBlock % kAmxKeys == 0, "whole products in a block");

// A tile is padded to whole head tiles of 4, so a group of 3 heads is the smallest that fills one
// well. Rows of K and V are read in whole tile rows.
VP_INLINE bool takes_amx(const Call& c) {
  const int group = c.H / c.G;
  return group > 2 && group <= kAmxHeads && c.D % kAmxColumns == 0;
}

// Rows of a tile of sums: even and odd columns of up to 8 heads apart.
constexpr int kAmxSumHeads = kAmxRows / 2;
VP_INLINE int amx_sum_rows(int group) { return group <= 4 ? 8 : 2 * kAmxSumHeads; }

// The compiler does not see which memory the tile instructions read.
VP_INLINE void amx_fence() { asm volatile("" ::: "memory"); }

// What LDTILECFG reads.
struct alignas(64) AmxConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// The tile registers: 0 q; 1, 2 K or V; 3, 4 logits; 5 weights; 6, 7 sums. They are the thread's:
// what it had configured before comes back, so that a library whose configuration outlives its
// calls keeps it.
struct AmxScope {
  AmxConfig before;

  VP_INLINE void enter(AmxScope& scope, int heads, int sums) {
    _tile_storeconfig(&scope.before);
    AmxConfig config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      const bool of_heads = t == 0 || t == 3 || t == 4;
      config.rows[t] = static_cast<uint8_t>(t < 5 ? kAmxRows : sums);
      config.row_bytes[t] = static_cast<uint16_t>(of_heads ? heads * 4 : kAmxRowBytes);
    }
    amx_fence();
    _tile_loadconfig(&config);
  }
  VP_INLINE void leave(const AmxScope& scope) {
    amx_fence();
    if (scope.before.palette != 0) {
      _tile_loadconfig(&scope.before);
    } else {
      _tile_release();
    }
  }
};

// Everything but the products is that of the type itself.
template <class T, class S>
struct AmxWeigh : Weigh<S> {
  template <int UNITS>
  VP_INLINE void load(const T* const* v, int column, Pairs* x) {
    const S* const two[2] = {v[0], v[1]};
    Weigh<S>::template load<UNITS>(two, column, x);
  }
  VP_INLINE void load_rest(const T* const* v, int column, int n, Pairs& a, Pairs& b) {
    const S* const two[2] = {v[0], v[1]};
    Weigh<S>::load_rest(two, column, n, a, b);
  }
};
template <>
constexpr bool kHasNoPlaces<amx_bf16> = true;
template <>
constexpr bool kHasNoPlaces<amx_f8> = true;
template <>
struct Dot<amx_bf16> : Dot<bf16> {};
template <>
struct Dot<amx_f8> : Dot<f8_as_bf16> {};
template <>
struct QueryUnit<amx_bf16> : QueryUnit<bf16> {};
template <>
struct QueryUnit<amx_f8> : QueryUnit<f8_as_bf16> {};
template <>
struct Weigh<amx_bf16> : AmxWeigh<amx_bf16, bf16> {};
template <>
struct Weigh<amx_f8> : AmxWeigh<amx_f8, f8_as_bf16> {};
template <>
struct Lanewise<amx_bf16> : Lanewise<bf16> {
  static constexpr bool kWholeBlocks = true;
};
template <>
struct Lanewise<amx_f8> : Lanewise<amx_bf16> {};

// The pairs of 16 pairs' columns of four heads, from [4 heads, 16] to [16, 4 heads] with `stride`
// pairs from one row to the next.
VP_INLINE void amx_by_pairs(const bf16 (*heads)[kMaxHeadDim], int column, int stride, bf16* to) {
  __m512i a[4], two[4];
  for (int h = 0; h < 4; ++h) a[h] = _mm512_load_si512(heads[h] + column);
  for (int h = 0; h < 4; h += 2) {
    two[h] = _mm512_unpacklo_epi32(a[h], a[h + 1]);
    two[h + 1] = _mm512_unpackhi_epi32(a[h], a[h + 1]);
  }
  // of each four pairs the first, the second, ...
  const __m512i row[4] = {
      _mm512_unpacklo_epi64(two[0], two[2]), _mm512_unpackhi_epi64(two[0], two[2]),
      _mm512_unpacklo_epi64(two[1], two[3]), _mm512_unpackhi_epi64(two[1], two[3])};
  for (int i = 0; i < 4; ++i) {
    const auto store = [&](int pair, __m128i four) {
      _mm_store_si128(reinterpret_cast<__m128i*>(to + pair * 2 * stride), four);
    };
    store(i, _mm512_castsi512_si128(row[i]));
    store(i + 4, _mm512_extracti32x4_epi32(row[i], 1));
    store(i + 8, _mm512_extracti32x4_epi32(row[i], 2));
    store(i + 12, _mm512_extracti32x4_epi32(row[i], 3));
  }
}

// Of each KV head [padded D / 2, heads, 2]: the pairs of columns that a tile of q holds.
template <class T>
struct AmxQuery {
  alignas(64) bf16 data[kMaxGroup * kMaxHeadDim];

  VP_INLINE void load(AmxQuery& into, const Call& c, int row, int kv_head, int to_head) {
    constexpr int kColumns = Dot<T>::kColumns;
    const int group = c.H / c.G, heads = padded_heads(group), columns = key_columns<T>(c.D);
    const int64_t first = c.rows[row].cache_row * c.q_stride.row +
                          c.rows[row].query * c.queries.q_stride +
                          int64_t{kv_head} * group * c.q_stride.head;
    bf16* to = into.data + to_head * columns;
    alignas(64) bf16 four[4][kMaxHeadDim];
    for (int h = 0; h < heads; h += 4, to += 8) {
      for (int i = h; i < h + 4; ++i) {
        for (int d = 0; d < columns; d += kColumns) {
          const int left = c.D - d < kColumns ? c.D - d : kColumns, n = i < group ? left : 0;
          const int64_t at = n > 0 ? first + i * c.q_stride.head + d : first;
          QueryUnit<T>::load(c, at, n, four[i - h] + d);
        }
      }
      for (int d = 0; d < columns; d += kUnit)
        amx_by_pairs(four, d, heads, to + int64_t{d} * heads);
    }
  }
};
template <>
struct Query<amx_bf16> : AmxQuery<amx_bf16> {};
template <>
struct Query<amx_f8> : AmxQuery<amx_f8> {};

// Bytes from each of 16 keys to the next; 0 where they are not evenly spaced.
template <class T>
VP_INLINE int64_t amx_spacing(const T* const* keys) {
  const int64_t step = reinterpret_cast<intptr_t>(keys[1]) - reinterpret_cast<intptr_t>(keys[0]);
  int64_t differs = 0;
  for (int i = 1; i < kAmxRows; ++i)
    differs |=
        (reinterpret_cast<intptr_t>(keys[i]) - reinterpret_cast<intptr_t>(keys[i - 1])) ^ step;
  return differs == 0 ? step : 0;
}

// Where a tile row of K begins, and the bytes to the next.
struct AmxRows {
  const char* first;
  int64_t stride;
};
template <class T>
VP_INLINE AmxRows amx_rows(const T* const* keys, int dim, bf16* space) {
  const int64_t spacing = lies_ready<T>(dim) ? amx_spacing(keys) : 0;
  if (spacing != 0) return {reinterpret_cast<const char*>(keys[0]), spacing};
  const int columns = key_columns<T>(dim);
  for (int i = 0; i < kAmxRows; ++i) stage_vector(keys[i], dim, space + i * columns);
  return {reinterpret_cast<const char*>(space), columns * static_cast<int64_t>(sizeof(bf16))};
}

// Dot products [16 keys, heads] of two tiles of keys; `fetch()` goes with each step.
template <class F>
VP_INLINE void amx_dots(const bf16* q, int heads, int steps, const AmxRows& low,
                        const AmxRows& high, const F& fetch, float* low_dots, float* high_dots) {
  amx_fence();
  _tile_zero(3);
  _tile_zero(4);
#pragma GCC unroll 1
  for (int s = 0; s < steps; ++s) {
    fetch();
    _tile_loadd(0, q + s * kAmxColumns * heads, heads * 4);
    _tile_loadd(1, low.first + s * kAmxRowBytes, low.stride);
    _tile_dpbf16ps(3, 1, 0);
    _tile_loadd(2, high.first + s * kAmxRowBytes, high.stride);
    _tile_dpbf16ps(4, 2, 0);
  }
  _tile_stored(3, low_dots, heads * 4);
  _tile_stored(4, high_dots, heads * 4);
  amx_fence();
}

// From dot products [16 keys, heads] to logits x of head tiles of 4: see stream.inl.h.
VP_INLINE void amx_logits(const float* dots, int tiles_of_heads, const Scaling& scaling, float* x) {
  const int heads = tiles_of_heads * 4;
  for (int i = 0; i < kAmxRows; i += 4) {
    for (int t = 0; t < tiles_of_heads; ++t, x += kLanes) {
      const float* from = dots + i * heads + t * 4;
      Vec dot = _mm512_castps128_ps512(_mm_load_ps(from));
      dot = _mm512_insertf32x4(dot, _mm_load_ps(from + heads), 1);
      dot = _mm512_insertf32x4(dot, _mm_load_ps(from + 2 * heads), 2);
      dot = _mm512_insertf32x4(dot, _mm_load_ps(from + 3 * heads), 3);
      vstore(x, logit(dot, scaling));
    }
  }
}

template <class T>
VP_INLINE void amx_dot_block(const AmxQuery<T>& q, int first_head, BlockKeys<T>& keys, int dim,
                             int tiles_of_heads, const Scaling& scaling, Asked<T>& asked,
                             float* x) {
  const int heads = tiles_of_heads * 4, columns = key_columns<T>(dim);
  const int steps = columns / kAmxColumns;
  alignas(64) bf16 space[2][kAmxRows * kMaxHeadDim];
  alignas(64) float dots[kMostKeys * kAmxHeads];
  const int whole = (keys.count + kAmxKeys - 1) / kAmxKeys * kAmxKeys;
  // any key will do
  for (int i = keys.count; i < whole; ++i) keys.k[i] = keys.k[keys.count - 1];
  const int each = Asked<T>::beside(asked, Phase::kProducts, whole / kAmxKeys * steps);
  const int more = Asked<T>::beside(asked, Phase::kLogits, whole * heads / kLanes);
  float* const to = tiles_of_heads == 1 ? x : dots;
  for (int first = 0; first < whole; first += kAmxKeys) {
    const AmxRows low = amx_rows(keys.k + first, dim, space[0]);
    const AmxRows high = amx_rows(keys.k + first + kAmxRows, dim, space[1]);
    amx_dots(
        q.data + first_head * columns, heads, steps, low, high,
        [&] { Asked<T>::some(asked, each); }, to + first * heads, to + (first + kAmxRows) * heads);
  }
  if (tiles_of_heads == 1) {
    for (int i = 0; i < whole * 4; i += kLanes) {
      Asked<T>::some(asked, more);
      vstore(x + i, logit(vload(x + i), scaling));
    }
  } else {
    for (int i = 0; i < whole; i += kAmxRows)
      amx_logits(dots + i * heads, tiles_of_heads, scaling, x + i * heads);
  }
  if (keys.count == whole && !keys.any_missing) return;
  for (int i = 0; i < whole; ++i) {
    if (i < keys.count && !(keys.any_missing && keys.missing[i])) continue;
    for (int t = 0; t < tiles_of_heads; ++t)
      for (int h = 0; h < 4; ++h)
        x[(i / 4 * tiles_of_heads + t) * kLanes + i % 4 * 4 + h] = minus_infinity();
  }
}

}  // namespace visionpulse::cpu::VP_ISA
