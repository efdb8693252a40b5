// SPDX-License-Identifier: Apache-2.0
// Q K^T and the weighted sum of V in bfloat16 by AMX, in the place of dot_block and sum_block.
//
//   logits [16 keys, heads]     = K [16 keys, 32 columns]   * Q [16 pairs of columns, heads]
//   sums   [heads, 16 columns]  = weights [heads, 32 keys]  * V [16 pairs of keys, 16 columns]
//
// K in bfloat16 is loaded where it lies if its keys are evenly spaced, else from a copy in L1. V
// always passes through L1, where its keys are interleaved in pairs. 8 bits are widened on the way
// to L1, K too. The logits of a key come from the same instructions wherever it lies, and so do the
// sums of a head.
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

// The compiler does not see which memory the tile instructions read.
VP_INLINE void amx_fence() { asm volatile("" ::: "memory"); }

// What LDTILECFG reads.
struct alignas(64) AmxConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// The tile registers: 0 q; 1, 2 logits; 3, 4 K or V; 5 weights; 6, 7 sums. They are the thread's:
// what it had configured before comes back, so that a library whose configuration outlives its
// calls keeps it.
struct AmxScope {
  AmxConfig before;

  VP_INLINE void enter(AmxScope& scope, int heads) {
    _tile_storeconfig(&scope.before);
    AmxConfig config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = static_cast<uint8_t>(t < 5 ? kAmxRows : heads);
      config.row_bytes[t] = static_cast<uint16_t>(t < 3 ? heads * 4 : kAmxRowBytes);
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
    alignas(64) bf16 head[kMaxHeadDim];
    for (int h = 0; h < heads; ++h) {
      for (int d = 0; d < columns; d += kColumns) {
        const int left = c.D - d < kColumns ? c.D - d : kColumns, n = h < group ? left : 0;
        QueryUnit<T>::load(c, n > 0 ? first + h * c.q_stride.head + d : first, n, head + d);
      }
      for (int d = 0; d < columns; ++d) to[(d / 2 * heads + h) * 2 + d % 2] = head[d];
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

// Dot products [16 keys, heads] of two tiles of keys; `fetch(s)` goes with step s.
template <class F>
VP_INLINE void amx_dots(const bf16* q, int heads, int steps, const AmxRows& low,
                        const AmxRows& high, const F& fetch, float* low_dots, float* high_dots) {
  amx_fence();
  _tile_zero(1);
  _tile_zero(2);
#pragma GCC unroll 1
  for (int s = 0; s < steps; ++s) {
    fetch(s);
    _tile_loadd(0, q + s * kAmxColumns * heads, heads * 4);
    _tile_loadd(3, low.first + s * kAmxRowBytes, low.stride);
    _tile_dpbf16ps(1, 3, 0);
    _tile_loadd(4, high.first + s * kAmxRowBytes, high.stride);
    _tile_dpbf16ps(2, 4, 0);
  }
  _tile_stored(1, low_dots, heads * 4);
  _tile_stored(2, high_dots, heads * 4);
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
                             int tiles_of_heads, const Scaling& scaling, const Asked<T>& asked,
                             float* x) {
  const int heads = tiles_of_heads * 4, columns = key_columns<T>(dim);
  const int steps = columns / kAmxColumns;
  alignas(64) bf16 space[2][kAmxRows * kMaxHeadDim];
  alignas(64) float dots[2][kAmxRows * kAmxHeads];
  const int whole = (keys.count + kAmxKeys - 1) / kAmxKeys * kAmxKeys;
  // any key will do
  for (int i = keys.count; i < whole; ++i) keys.k[i] = keys.k[keys.count - 1];
  for (int first = 0; first < whole; first += kAmxKeys) {
    const auto fetch = [&](int s) {
      for (int i = first + kAmxKeys * s / steps; i < first + kAmxKeys * (s + 1) / steps; ++i) {
        prefetch_vector(asked.k[i], asked.lines);
        prefetch_vector(*soon_keys(asked, keys, i), asked.lines);
      }
    };
    const AmxRows low = amx_rows(keys.k + first, dim, space[0]);
    const AmxRows high = amx_rows(keys.k + first + kAmxRows, dim, space[1]);
    amx_dots(q.data + first_head * columns, heads, steps, low, high, fetch, dots[0], dots[1]);
    float* to = x + first * heads;
    amx_logits(dots[0], tiles_of_heads, scaling, to);
    amx_logits(dots[1], tiles_of_heads, scaling, to + kAmxRows * heads);
  }
  if (keys.count == whole && !keys.any_missing) return;
  for (int i = 0; i < whole; ++i) {
    if (i < keys.count && !(keys.any_missing && keys.missing[i])) continue;
    for (int t = 0; t < tiles_of_heads; ++t)
      for (int h = 0; h < 4; ++h)
        x[(i / 4 * tiles_of_heads + t) * kLanes + i % 4 * 4 + h] = minus_infinity();
  }
}

// From weights p of 8 key tiles of a head tile, `count` of which have keys, to rows of bfloat16:
// [4 heads, 32 keys].
VP_INLINE void amx_weights(const float* p, int p_stride, int count, bf16* rows) {
  struct ByHead {
    alignas(64) uint16_t lane[32];
    constexpr ByHead() : lane() {
      for (int i = 0; i < 32; ++i) lane[i] = static_cast<uint16_t>(i % 8 * 4 + i / 8);
    }
  };
  static constexpr ByHead by_head;
  const __m512i order = _mm512_load_si512(by_head.lane);
  __m512i w[4];  // [4 heads, 8 keys]
  for (int i = 0; i < 4; ++i) {
    const Vec low = 2 * i < count ? vload(p + 2 * i * p_stride) : vzero();
    const Vec high = 2 * i + 1 < count ? vload(p + (2 * i + 1) * p_stride) : vzero();
    w[i] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  const __m512i a = _mm512_shuffle_i32x4(w[0], w[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4(w[2], w[3], 0x44);
  const __m512i d = _mm512_shuffle_i32x4(w[0], w[1], 0xee);
  const __m512i e = _mm512_shuffle_i32x4(w[2], w[3], 0xee);
  _mm512_store_si512(rows, _mm512_shuffle_i32x4(a, b, 0x88));
  _mm512_store_si512(rows + 32, _mm512_shuffle_i32x4(a, b, 0xdd));
  _mm512_store_si512(rows + 64, _mm512_shuffle_i32x4(d, e, 0x88));
  _mm512_store_si512(rows + 96, _mm512_shuffle_i32x4(d, e, 0xdd));
}

// V of 32 keys as pairs: a tile of 16 pairs and 16 columns at `first`, and the bytes from a pair to
// the next and from a tile to the next.
struct AmxValues {
  const char* first;
  int64_t to_pair, to_tile;
};

// acc [heads, columns] = acc * rescale + weights [heads, 32 keys] * V; an even number of tiles.
VP_INLINE void amx_add_values(const bf16* weights, const AmxValues& v, int heads, int columns,
                              const float* rescale, float* acc) {
  alignas(64) float sums[2][kAmxHeads * kLanes];
  amx_fence();
  _tile_loadd(5, weights, kAmxRowBytes);
#pragma GCC unroll 1
  for (int d = 0; d < columns; d += 2 * kLanes) {
    const char* const tile = v.first + d / kLanes * v.to_tile;
    _tile_zero(6);
    _tile_zero(7);
    _tile_loadd(3, tile, v.to_pair);
    _tile_dpbf16ps(6, 5, 3);
    _tile_loadd(4, tile + v.to_tile, v.to_pair);
    _tile_dpbf16ps(7, 5, 4);
    _tile_stored(6, sums[0], kAmxRowBytes);
    _tile_stored(7, sums[1], kAmxRowBytes);
    amx_fence();
    for (int h = 0; h < heads; ++h) {
      float* to = acc + h * columns + d;
      const Vec scale = vset(rescale[h]);
      vstore(to, vfma(vload(to), scale, vload(sums[0] + h * kLanes)));
      vstore(to + kLanes, vfma(vload(to + kLanes), scale, vload(sums[1] + h * kLanes)));
    }
  }
}

template <class T>
VP_INLINE void amx_sum_block(const Call& c, BlockKeys<T>& keys, const Asked<T>& asked,
                             const float* x, const Rescales& rescales, const Part& part) {
  const int group = c.H / c.G, tiles = head_tiles(group);
  alignas(64) bf16 weights[kAmxHeads * kAmxKeys];
  // [D / 16, 16 pairs of keys, 16 columns, 2]: a tile each
  alignas(64) bf16 pairs[kMaxHeadDim / kLanes][kAmxRows][2 * kLanes];
  const AmxValues values = {reinterpret_cast<const char*>(pairs), kAmxRowBytes, sizeof pairs[0]};
  float rescale[kAmxHeads];
  for (int h = 0; h < group; ++h) rescale[h] = rescales.tile[h / 4][h % 4];
  const int whole = (keys.count + kAmxKeys - 1) / kAmxKeys * kAmxKeys;
  for (int i = keys.count; i < whole; ++i) keys.v[i] = reinterpret_cast<const T*>(kZeros);
  for (int first = 0; first < whole; first += kAmxKeys) {
#pragma GCC unroll 1
    for (int i = 0; i < kAmxRows; ++i) {
      for (int n = first + 2 * i; n < first + 2 * i + 2; ++n) {
        prefetch_vector(asked.v[n], asked.lines);
        prefetch_vector(*soon_values(asked, keys.v, keys.count, n), asked.lines);
      }
      const T* const* v = keys.v + first + 2 * i;
      const auto store = [&](int d, const Pairs* x, int n) {
        for (int u = 0; u < n; ++u) _mm512_store_si512(pairs[d / kLanes + u][i], (__m512i)x[u].x);
      };
      Pairs x[2 * kValueUnits];
      int d = 0;
      for (; d + kValueUnits * kUnit <= c.D; d += kValueUnits * kUnit) {
        Weigh<T>::template load<kValueUnits>(v, d, x);
        store(d, x, 2 * kValueUnits);
      }
      for (; d < c.D; d += kUnit) {
        Weigh<T>::template load<1>(v, d, x);
        store(d, x, 2);
      }
    }
    const int left = (keys.count - first + 3) / 4;
    for (int t = 0; t < tiles; ++t)
      amx_weights(x + (first / 4 * tiles + t) * kLanes, tiles * kLanes, left,
                  weights + t * 4 * kAmxKeys);
    amx_add_values(weights, values, group, c.D, rescale, part.acc);
    for (int h = 0; h < group; ++h) rescale[h] = 1.0f;
  }
}

#define VP_AMX_BLOCKS(T)                                                                        \
  template <>                                                                                   \
  VP_SPECIALIZED void dot_block<T, 4>(const Query<T>& q, int first_head, BlockKeys<T>& keys,    \
                                      int dim, int tiles_of_heads, const Scaling& scaling,      \
                                      const Asked<T>& asked, float* x) {                        \
    amx_dot_block<T>(q, first_head, keys, dim, tiles_of_heads, scaling, asked, x);              \
  }                                                                                             \
  template <>                                                                                   \
  VP_SPECIALIZED void sum_block<T, 4>(const Call& c, BlockKeys<T>& keys, const Asked<T>& asked, \
                                      const float* x, const Rescales& rescales,                 \
                                      const Part& part) {                                       \
    amx_sum_block<T>(c, keys, asked, x, rescales, part);                                        \
  }
VP_AMX_BLOCKS(amx_bf16)
VP_AMX_BLOCKS(amx_f8)
#undef VP_AMX_BLOCKS

}  // namespace visionpulse::cpu::VP_ISA
