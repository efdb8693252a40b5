// SPDX-License-Identifier: Apache-2.0
// The logits of a block of keys.
#pragma once

#include "kernels/cpu/keys.inl.h"
#include "kernels/cpu/math.inl.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kUnit = 2 * kWidth;             // columns of one step along D
constexpr int kDotLanes = kDotVecs * kWidth;  // dot products of one dot tile

// How q and k of a storage type are multiplied: in float32, unless the CPU multiplies pairs of the
// type itself.
template <class T>
struct Dot {
  static constexpr int kColumns = kUnit;  // of a unit
  using Query = float;
  struct Unit {
    Vec a, b;
  };
  VP_INLINE Unit query(const float* q) { return {vload(q), vload(q + kWidth)}; }
  VP_INLINE Unit key(const T* k) {
    Unit u;
    load_unit(k, u.a, u.b);
    return u;
  }
  VP_INLINE Unit key_tail(const T* k, int n) {
    Unit u;
    load_tail(k, n, u.a, u.b);
    return u;
  }
  VP_INLINE Vec add(Vec acc, Unit q, Unit k) { return vfma(q.b, k.b, vfma(q.a, k.a, acc)); }
  VP_INLINE void store(float* to, Unit u) {
    vstore(to, u.a);
    vstore(to + kWidth, u.b);
  }
};

#if defined(VP_HAS_PAIR_DOT)
template <>
struct Dot<bf16> {
  static constexpr int kColumns = kUnit;
  using Query = bf16;
  using Unit = Pairs;
  VP_INLINE Unit query(const bf16* q) { return load_pairs(q); }
  VP_INLINE Unit key(const bf16* k) { return load_pairs(k); }
  VP_INLINE Unit key_tail(const bf16* k, int n) { return load_pairs_tail(k, n); }
  VP_INLINE Vec add(Vec acc, Unit q, Unit k) { return dot_pairs(acc, q, k); }
  VP_INLINE void store(bf16* to, Unit u) { __builtin_memcpy(to, &u, sizeof u); }
};
#endif

#if defined(VP_HAS_PAIR_BYTES)
template <>
struct Dot<f8_as_bf16> {
  static constexpr int kColumns = 2 * kUnit;
  using Query = bf16;
  struct Unit {
    Pairs a, b;
  };
  VP_INLINE Unit query(const bf16* q) { return {load_pairs(q), load_pairs(q + kUnit)}; }
  VP_INLINE Unit key(const f8_as_bf16* k) {
    Unit u;
    widen(load_bytes(k), u.a, u.b);
    return u;
  }
  VP_INLINE Unit key_tail(const f8_as_bf16* k, int n) {
    Unit u;
    widen(load_bytes(k, n), u.a, u.b);
    return u;
  }
  VP_INLINE Vec add(Vec acc, Unit q, Unit k) {
    return dot_pairs(dot_pairs(acc, q.a, k.a), q.b, k.b);
  }
  VP_INLINE void store(bf16* to, Unit u) { __builtin_memcpy(to, &u, sizeof u); }
};
using f8_beside_bf16 = f8_as_bf16;
#else
using f8_beside_bf16 = f8;
#endif

// The first n elements of a unit of q, then zeros, in the order of K's units.
template <class T>
struct QueryUnit {
  VP_INLINE void load(const Call& c, int64_t at, int n, typename Dot<T>::Query* to) {
    const T* from = static_cast<const T*>(c.q) + at;
    Dot<T>::store(to, n == kUnit ? Dot<T>::key(from) : Dot<T>::key_tail(from, n));
  }
};

#if defined(VP_HAS_PAIR_BYTES)
template <>
struct QueryUnit<f8_as_bf16> {
  VP_INLINE void load(const Call& c, int64_t at, int n, bf16* to) {
    constexpr int kColumns = Dot<f8_as_bf16>::kColumns;
    bf16 columns[kColumns] = {};
    __builtin_memcpy(columns, static_cast<const bf16*>(c.q) + at, n * sizeof(bf16));
    for (int i = 0; i < kColumns; i += 16) {
      __builtin_memcpy(to + i / 2, columns + i, 8 * sizeof(bf16));
      __builtin_memcpy(to + i / 2 + kUnit, columns + i + 8, 8 * sizeof(bf16));
    }
  }
};
#endif

// Beside K of f8, q has a dtype of its own; the units of f8 hold their columns in order.
template <>
struct QueryUnit<f8> {
  VP_INLINE void load(const Call& c, int64_t at, int n, float* to) {
    if (c.dtype == DType::kFloat32) return QueryUnit<float>::load(c, at, n, to);
    if (c.dtype == DType::kFloat16) return QueryUnit<f16>::load(c, at, n, to);
    const bf16* from = static_cast<const bf16*>(c.q) + at;
    for (int i = 0; i < kUnit; ++i) {
      const uint32_t bits = i < n ? uint32_t{from[i].bits} << 16 : 0;
      __builtin_memcpy(to + i, &bits, sizeof bits);
    }
  }
};

// The query heads of KV heads that run together, each one's padded with zeros to whole head tiles
// and units.
template <class T>
struct Query {
  static constexpr int kColumns = Dot<T>::kColumns;
  alignas(64) typename Dot<T>::Query data[kMaxGroup * kMaxHeadDim];  // [padded heads, padded D]
  int32_t stride;

  VP_INLINE void load(Query& into, const Call& c, int row, int kv_head, int to_head) {
    const int group = c.H / c.G, whole = c.D / kColumns, rest = c.D % kColumns;
    into.stride = padded_dim(c.D, kColumns);
    const int64_t first = c.rows[row].cache_row * c.q_stride.row +
                          c.rows[row].query * c.queries.q_stride +
                          int64_t{kv_head} * group * c.q_stride.head;
    for (int h = 0; h < padded_heads(group); ++h) {
      auto* to = into.data + (to_head + h) * into.stride;
      for (int u = 0; u * kColumns < into.stride; ++u) {
        const int n = h >= group ? 0 : u < whole ? kColumns : rest;
        QueryUnit<T>::load(c, n > 0 ? first + h * c.q_stride.head + u * kColumns : first, n,
                           to + u * kColumns);
      }
    }
  }
};

// Dot products of kDotLanes / HT keys with HT heads; lane = key * HT + head. DIM is the head dim
// where it is common enough to unroll for, else 0. The first head tile asks: by places for the
// vectors of `ahead` and `soon`, else as `asked` says.
template <class T, int HT, int DIM, bool PLACES>
VP_INLINE void dot_tile(const typename Dot<T>::Query* q, int q_stride, const T* const* keys,
                        const T* const* ahead, const T* const* soon, Asked<T>& asked, int any_dim,
                        Vec* out /* [kDotVecs] */) {
  constexpr int kKeys = kDotLanes / HT, kColumns = Dot<T>::kColumns;
  const int dim = DIM > 0 ? DIM : any_dim;
  Vec acc[kDotLanes];
  for (int i = 0; i < kDotLanes; ++i) acc[i] = vzero();
  const int whole = dim / kColumns * kColumns;
#pragma GCC unroll 8
  for (int d = 0; d < whole; d += kColumns) {
    typename Dot<T>::Unit query[HT];
    for (int h = 0; h < HT; ++h) query[h] = Dot<T>::query(q + h * q_stride + d);
    if (kAsksByPages && !PLACES) Asked<T>::some(asked, asked.each);
    for (int n = 0; n < kKeys; ++n) {
      const auto key = Dot<T>::key(keys[n] + d);
      if (PLACES) {
        prefetch_columns<kColumns>(ahead[n], d);
        if (!kAsksByPages) prefetch_columns<kColumns>(soon[n], d);
      }
      for (int h = 0; h < HT; ++h) acc[n * HT + h] = Dot<T>::add(acc[n * HT + h], query[h], key);
    }
  }
  if (whole < dim) {
    for (int n = 0; n < kKeys; ++n) {
      const auto key = Dot<T>::key_tail(keys[n] + whole, dim - whole);
      if (PLACES) {
        prefetch_columns<kColumns>(ahead[n], whole);
        if (!kAsksByPages) prefetch_columns<kColumns>(soon[n], whole);
      }
      for (int h = 0; h < HT; ++h) {
        const auto query = Dot<T>::query(q + h * q_stride + whole);
        acc[n * HT + h] = Dot<T>::add(acc[n * HT + h], query, key);
      }
    }
  }
  for (int i = 0; i < kDotVecs; ++i) out[i] = vreduce(acc + i * kWidth);
}

// From a dot product to a logit times log2(e).
struct Scaling {
  float scale;   // without a cap: scale * log2(e); with one: scale / cap
  float capped;  // cap * log2(e); 0: no cap
};
// `factor` is what K is multiplied with beside the scale.
VP_INLINE Scaling scaling_of(const ScoreArgs& s, float factor) {
  if (s.softcap == 0.0f) return {s.scale * kLog2e * factor, 0.0f};
  return {s.scale / s.softcap * factor, s.softcap * kLog2e};
}
// What the elements of K or V that load_unit gives are to be multiplied with.
template <class T>
VP_INLINE float factor_of(const CacheScale& scale, int kv_head) {
  return sizeof(T) == 1 ? scale_of(scale, kv_head) / kShare<T> : 1.0f;
}
VP_INLINE Vec logit(Vec dot, const Scaling& s) {
  const Vec z = vmul(dot, vset(s.scale));
  return s.capped == 0.0f ? z : vmul(vset(s.capped), tanh_full(z));
}

template <class T, int HT, bool PLACES>
VP_INLINE void dot_tile_of(const Query<T>& q, int head, const T* const* keys, const T* const* ahead,
                           const T* const* soon, Asked<T>& asked, int dim, Vec* out) {
  const auto* heads = q.data + head * q.stride;
  if (dim == 128) {
    dot_tile<T, HT, 128, PLACES>(heads, q.stride, keys, ahead, soon, asked, dim, out);
  } else {
    dot_tile<T, HT, 0, PLACES>(heads, q.stride, keys, ahead, soon, asked, dim, out);
  }
}

// Logits x [key tiles, head tiles, kLanes] of a block. Lanes without a key get -inf.
template <class T, int HT>
VP_INLINE void dot_block(const Query<T>& q, int first_head, BlockKeys<T>& keys, int dim,
                         int tiles_of_heads, const Scaling& scaling, Asked<T>& asked, float* x) {
  constexpr int kTileKeys = kLanes / HT, kDotKeys = kDotLanes / HT;
  const int whole = (keys.count + kTileKeys - 1) / kTileKeys * kTileKeys;
  // a partial tile repeats its last key, so every logit comes from the same instructions
  for (int i = keys.count; i < whole; ++i) keys.k[i] = keys.k[keys.count - 1];
  constexpr int kColumns = Dot<T>::kColumns;
  const bool places = asked.pass == nullptr;
  const int steps = (whole + kDotKeys - 1) / kDotKeys * ((dim + kColumns - 1) / kColumns);
  const int each = Asked<T>::beside(asked, Phase::kProducts, steps) +
                   Asked<T>::beside(asked, Phase::kLogits, steps);
  for (int first = 0; first < whole; first += kDotKeys) {
    const T* const* const soon = soon_keys(asked, keys, first);
    for (int t = 0; t < tiles_of_heads; ++t) {
      Vec out[kDotVecs];
      asked.each = t == 0 ? each : 0;
      if (t == 0 && places) {
        dot_tile_of<T, HT, true>(q, first_head, keys.k + first, asked.k + first, soon, asked, dim,
                                 out);
      } else {
        dot_tile_of<T, HT, false>(q, first_head + t * HT, keys.k + first, nullptr, nullptr, asked,
                                  dim, out);
      }
      float* to = x + (first / kTileKeys * tiles_of_heads + t) * kLanes + first % kTileKeys * HT;
      for (int i = 0; i < kDotVecs; ++i) vstore(to + i * kWidth, logit(out[i], scaling));
    }
  }
  if (keys.count == whole && !keys.any_missing) return;
  for (int i = 0; i < whole; ++i) {
    if (i < keys.count && !(keys.any_missing && keys.missing[i])) continue;
    for (int t = 0; t < tiles_of_heads; ++t)
      for (int h = 0; h < HT; ++h)
        x[(i / kTileKeys * tiles_of_heads + t) * kLanes + i % kTileKeys * HT + h] =
            minus_infinity();
  }
}

}  // namespace visionpulse::cpu::VP_ISA
