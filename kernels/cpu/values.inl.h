// SPDX-License-Identifier: Apache-2.0
// The weighted sum of V over a block of keys.
#pragma once

#include "kernels/cpu/dot.inl.h"
#include "kernels/cpu/parts.inl.h"

namespace visionpulse::cpu::VP_ISA {

// How weights and V of a storage type are multiplied: a key at a time in float32, unless the CPU
// multiplies pairs of the type itself.
template <class T>
struct Weigh {
  static constexpr int kKeys = 1;  // of a step
  using Value = Vec;
  template <int UNITS>
  VP_INLINE void load(const T* const* v, int column, Vec* x /* [2 * UNITS] */) {
    for (int u = 0; u < UNITS; ++u) load_unit(v[0] + column + u * kUnit, x[2 * u], x[2 * u + 1]);
  }
  VP_INLINE void load_rest(const T* const* v, int column, int n, Vec& a, Vec& b) {
    load_tail(v[0] + column, n, a, b);
  }
  VP_INLINE Vec weight(const float* p) { return vset(*p); }
  VP_INLINE Vec add(Vec sum, Vec weight, Vec value) { return vfma(weight, value, sum); }
};

#if defined(VP_HAS_PAIR_DOT)
// Two keys a step: half the multiplications, with weights rounded to bfloat16.
template <>
struct Weigh<bf16> {
  static constexpr int kKeys = 2;
  using Value = Pairs;
  template <int UNITS>
  VP_INLINE void load(const bf16* const* v, int column, Pairs* x) {
    for (int u = 0; u < UNITS; ++u, column += kUnit)
      interleave(load_pairs(v[0] + column), load_pairs(v[1] + column), x[2 * u], x[2 * u + 1]);
  }
  VP_INLINE void load_rest(const bf16* const* v, int column, int n, Pairs& a, Pairs& b) {
    interleave(load_pairs_tail(v[0] + column, n), load_pairs_tail(v[1] + column, n), a, b);
  }
  VP_INLINE Pairs weight(const float* p) { return repeat_pair(p); }
  VP_INLINE Vec add(Vec sum, Pairs weight, Pairs value) { return dot_pairs(sum, weight, value); }
};
#endif

#if defined(VP_HAS_PAIR_BYTES)
template <>
struct Weigh<f8_as_bf16> : Weigh<bf16> {
  template <int UNITS>
  VP_INLINE void load(const f8_as_bf16* const* v, int column, Pairs* x) {
    if constexpr (UNITS == 2) {
      interleave(load_bytes(v[0] + column), load_bytes(v[1] + column), x);
    } else {
      load_rest(v, column, kUnit, x[0], x[1]);
    }
  }
  VP_INLINE void load_rest(const f8_as_bf16* const* v, int column, int n, Pairs& a, Pairs& b) {
    interleave(load_bytes(v[0] + column, n), load_bytes(v[1] + column, n), a, b);
  }
};
#endif

// acc[h] = acc[h] * rescale[h] + sum over keys of p[key, h] * v[key], for NH heads and UNITS units
// of columns. A block is summed from zero and then added, which also keeps rounding errors small.
// p [key tiles, steps, HT]. A tail is one unit. The first head tile asks for vectors to come.
template <class T, int HT, int NH, int UNITS, bool TAIL>
VP_INLINE void value_tile(const T* const* values, int keys, Asked<T>* asked, const float* p,
                          int p_stride, int dim, int column, const float* rescale, float* acc,
                          int acc_stride) {
  using W = Weigh<T>;
  constexpr int kTileKeys = kLanes / HT;
  const bool places = asked != nullptr && asked->pass == nullptr;
  Vec sum[NH][2 * UNITS];
  for (int h = 0; h < NH; ++h)
    for (int u = 0; u < 2 * UNITS; ++u) sum[h][u] = vzero();
  for (int first = 0; first < keys; first += kTileKeys, p += p_stride) {
    const int n = keys - first < kTileKeys ? keys - first : kTileKeys;
    if (kAsksByPages && asked != nullptr) Asked<T>::some(*asked, asked->each);
    if (!kAsksByPages && asked != nullptr && column == 0) {
      const T* const* const soon = soon_values(*asked, values, keys, first);
      for (int i = 0; i < n; ++i) prefetch_vector(soon[i], asked->lines);
    }
    for (int i = 0; i < n; i += W::kKeys) {
      const T* const* v = values + first + i;
      typename W::Value x[2 * UNITS];
      if (TAIL) {
        W::load_rest(v, column, dim - column, x[0], x[1]);
      } else {
        W::template load<UNITS>(v, column, x);
      }
      if (places)
        for (int j = 0; j < W::kKeys; ++j)
          prefetch_columns<UNITS * kUnit>(asked->v[first + i + j], column);
      for (int h = 0; h < NH; ++h) {
        const auto weight = W::weight(p + i / W::kKeys * HT + h);
        for (int u = 0; u < 2 * UNITS; ++u) sum[h][u] = W::add(sum[h][u], weight, x[u]);
      }
    }
  }
  for (int h = 0; h < NH; ++h) {
    float* to = acc + h * acc_stride + column;
    const Vec scale = vset(rescale[h]);
    for (int u = 0; u < 2 * UNITS; ++u)
      vstore(to + u * kWidth, vfma(vload(to + u * kWidth), scale, sum[h][u]));
  }
}

template <class T, int HT, int NH>
VP_INLINE void value_columns(const T* const* values, int keys, Asked<T>* asked, const float* p,
                             int p_stride, int dim, const float* rescale, float* acc,
                             int acc_stride) {
  int d = 0;
  for (; d + kValueUnits * kUnit <= dim; d += kValueUnits * kUnit)
    value_tile<T, HT, NH, kValueUnits, false>(values, keys, asked, p, p_stride, dim, d, rescale,
                                              acc, acc_stride);
  for (; kValueUnits > 1 && d + kUnit <= dim; d += kUnit)
    value_tile<T, HT, NH, 1, false>(values, keys, asked, p, p_stride, dim, d, rescale, acc,
                                    acc_stride);
  if (d < dim)
    value_tile<T, HT, NH, 1, true>(values, keys, asked, p, p_stride, dim, d, rescale, acc,
                                   acc_stride);
}

// One head tile with `heads` <= HT heads; the lanes of its padding are not read.
template <class T, int HT>
static void add_values(const T* const* values, int keys, Asked<T>* asked, const float* p,
                       int p_stride, int dim, int heads, const float* rescale, float* acc,
                       int acc_stride) {
  if (heads == 1) {
    value_columns<T, HT, 1>(values, keys, asked, p, p_stride, dim, rescale, acc, acc_stride);
  } else if (HT >= 2 && heads == 2) {
    value_columns<T, HT, HT >= 2 ? 2 : 1>(values, keys, asked, p, p_stride, dim, rescale, acc,
                                          acc_stride);
  } else if (HT == 4 && heads == 3) {
    value_columns<T, HT, HT == 4 ? 3 : 1>(values, keys, asked, p, p_stride, dim, rescale, acc,
                                          acc_stride);
  } else {
    value_columns<T, HT, HT == 4 ? 4 : 1>(values, keys, asked, p, p_stride, dim, rescale, acc,
                                          acc_stride);
  }
}

// All heads of a block, into their sums. Lanes of x without a key have weight 0.
template <class T, int HT>
VP_INLINE void sum_block(const Call& c, BlockKeys<T>& keys, Asked<T>& asked, const float* x,
                         const Rescales& rescales, float* acc) {
  const int group = c.H / c.G, tiles = head_tiles(group), columns = padded_dim(c.D, kUnit);
  constexpr int kTileColumns = kValueUnits * kUnit;
  const int steps =
      (keys.count * HT + kLanes - 1) / kLanes * ((columns + kTileColumns - 1) / kTileColumns);
  asked.each =
      Asked<T>::beside(asked, Phase::kSums, steps) + Asked<T>::beside(asked, Phase::kOutput, steps);
  if (Weigh<T>::kKeys == 2 && keys.count % 2 != 0)
    keys.v[keys.count] = reinterpret_cast<const T*>(kZeros);
  for (int t = 0; t < tiles; ++t) {
    const int heads = group - t * HT < HT ? group - t * HT : HT;
    const float* p = x + t * kLanes;
    int p_stride = tiles * kLanes;
#if defined(VP_HAS_PAIR_DOT)
    alignas(64) float pairs[kMostKeys / 2 * HT + kLanes];
    if (Weigh<T>::kKeys == 2) {
      pack_weights<HT>(p, p_stride, (keys.count * HT + kLanes - 1) / kLanes, pairs);
      p = pairs;
      p_stride = kLanes / 2;
    }
#endif
    add_values<T, HT>(keys.v, keys.count, t == 0 ? &asked : nullptr, p, p_stride, c.D, heads,
                      rescales.tile[t], acc + t * HT * columns, columns);
  }
}

}  // namespace visionpulse::cpu::VP_ISA
