// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one block of keys: exponentials, logits, and weighted values.
#pragma once

#include "kernels/common/float_bits.h"
#include "kernels/common/softmax.h"
#include "kernels/cpu/call.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kUnit = 2 * kWidth;        // columns of a value step
constexpr int kParts = kLanes / kWidth;  // registers of a tile

// 2^x for x <= 0 or moderate, by a minimax polynomial of 2^f on [-1/2, 1/2]; relative error 7.5e-8.
VP_INLINE Vec exp2_full(Vec x) {
  const Vec n = vround(x), f = vsub(x, n);
  Vec p = vfma(vset(1.327647199e-3f), f, vset(9.675541334e-3f));
  p = vfma(p, f, vset(5.550713274e-2f));
  p = vfma(p, f, vset(2.402211972e-1f));
  p = vfma(p, f, vset(6.931469671e-1f));
  return vscale(x, vfma(p, f, vset(1.000000072f)), n);
}

// The same to 2.6e-6: enough for the mass, whose own tolerance is 1e-4.
VP_INLINE Vec exp2_mass(Vec x) {
  const Vec n = vround(x), f = vsub(x, n);
  Vec p = vfma(vset(9.570101912e-3f), f, vset(5.591786032e-2f));
  p = vfma(p, f, vset(2.402474482e-1f));
  p = vfma(p, f, vset(6.931218147e-1f));
  return vscale(x, vfma(p, f, vset(9.999992615e-1f)), n);
}

// tanh: an odd polynomial near zero, where 1 - 2 / (e^2y + 1) would cancel.
VP_INLINE Vec tanh_full(Vec x) {
  const Vec y = vabs(x), s = vmul(x, x);
  Vec p = vfma(vset(-5.468268432e-3f), s, vset(2.041519384e-2f));
  p = vfma(p, s, vset(-5.366528067e-2f));
  p = vfma(p, s, vset(1.333041515e-1f));
  p = vfma(p, s, vset(-3.333322927e-1f));
  const Vec small = vfma(vmul(p, s), x, x);
  const Vec bounded = vless(y, vset(20.0f), y, vless(vset(19.0f), y, vset(20.0f), y));
  const Vec e = exp2_full(vmul(bounded, vset(2.0f * kLog2e)));
  const Vec large = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
  return vless(y, vset(0.6f), small, vcopysign(large, x));
}

// --- logits
// ------------------------------------------------------------------------------------------

// How q and k of a type meet: in float32, unless the CPU multiplies pairs of the type itself.
template <class T>
struct Dot {
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
  using Query = bf16;
  using Unit = Pairs;
  VP_INLINE Unit query(const bf16* q) { return load_pairs(q); }
  VP_INLINE Unit key(const bf16* k) { return load_pairs(k); }
  VP_INLINE Unit key_tail(const bf16* k, int n) { return load_pairs_tail(k, n); }
  VP_INLINE Vec add(Vec acc, Unit q, Unit k) { return dot_pairs(acc, q, k); }
  VP_INLINE void store(bf16* to, Unit u) { __builtin_memcpy(to, &u, sizeof u); }
};
#endif

// The query heads of one KV head, padded with zeros to whole head tiles and units.
template <class T>
struct Query {
  alignas(64) typename Dot<T>::Query data[kMaxGroup * kMaxHeadDim];  // [padded heads, padded D]
  int32_t stride;

  VP_INLINE void load(Query& into, const Call& c, int row, int kv_head) {
    const int group = c.H / c.G, whole = c.D / kUnit, rest = c.D % kUnit;
    into.stride = padded_dim(c.D, kUnit);
    const T* q = static_cast<const T*>(c.q) + row * c.q_stride.row +
                 int64_t{kv_head} * group * c.q_stride.head;
    for (int h = 0; h < padded_heads(group); ++h) {
      auto* to = into.data + h * into.stride;
      const T* from = q + h * c.q_stride.head;
      for (int u = 0; u * kUnit < into.stride; ++u) {
        const int n = h >= group ? 0 : u < whole ? kUnit : rest;
        Dot<T>::store(to + u * kUnit, n == kUnit ? Dot<T>::key(from + u * kUnit)
                                                 : Dot<T>::key_tail(from + u * kUnit, n));
      }
    }
  }
};

constexpr int kDotLanes = kDotVecs * kWidth;  // dot products of one tile

// Dot products of kDotLanes / HT keys with HT heads; lane = key * HT + head. DIM is the head dim
// where it is common enough to unroll for, else 0.
template <class T, int HT, int DIM>
VP_INLINE void dot_tile(const typename Dot<T>::Query* q, int q_stride, const T* const* keys,
                        int any_dim, Vec* out /* [kDotVecs] */) {
  constexpr int kKeys = kDotLanes / HT;
  const int dim = DIM > 0 ? DIM : any_dim;
  Vec acc[kDotLanes];
  for (int i = 0; i < kDotLanes; ++i) acc[i] = vzero();
  const int whole = dim / kUnit * kUnit;
#pragma GCC unroll 8
  for (int d = 0; d < whole; d += kUnit) {
    typename Dot<T>::Unit query[HT];
    for (int h = 0; h < HT; ++h) query[h] = Dot<T>::query(q + h * q_stride + d);
    for (int n = 0; n < kKeys; ++n) {
      const auto key = Dot<T>::key(keys[n] + d);
      for (int h = 0; h < HT; ++h) acc[n * HT + h] = Dot<T>::add(acc[n * HT + h], query[h], key);
    }
  }
  if (whole < dim) {
    for (int n = 0; n < kKeys; ++n) {
      const auto key = Dot<T>::key_tail(keys[n] + whole, dim - whole);
      for (int h = 0; h < HT; ++h) {
        const auto query = Dot<T>::query(q + h * q_stride + whole);
        acc[n * HT + h] = Dot<T>::add(acc[n * HT + h], query, key);
      }
    }
  }
  for (int i = 0; i < kDotVecs; ++i) out[i] = vreduce(acc + i * kWidth);
}

// Dot product to logit, in powers of two.
struct Scaling {
  float scale;   // without a cap: scale * log2(e); with one: scale / cap
  float capped;  // cap * log2(e); 0: no cap
};
VP_INLINE Scaling scaling_of(const ScoreArgs& s) {
  if (s.softcap == 0.0f) return {s.scale * kLog2e, 0.0f};
  return {s.scale / s.softcap, s.softcap * kLog2e};
}
VP_INLINE Vec logit(Vec dot, const Scaling& s) {
  const Vec z = vmul(dot, vset(s.scale));
  return s.capped == 0.0f ? z : vmul(vset(s.capped), tanh_full(z));
}

constexpr int kLine = 64;  // bytes of a cache line

// Lines of a stream. Rolled: unrolled or nested in a loop over rows it costs a tenth of the
// bandwidth.
VP_INLINE void prefetch_stream(const void* from, int lines) {
  const char* p = static_cast<const char*>(from);
#pragma GCC unroll 1
  for (int i = 0; i < lines; ++i) __builtin_prefetch(p + i * kLine, 0, 3);
}

template <int LINES>
VP_INLINE void prefetch_lines(const void* from) {
  const char* p = static_cast<const char*>(from);
#pragma GCC unroll 8
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(p + i * kLine, 0, 3);
}
// A row that lies by itself; the common ones in a straight line.
VP_INLINE void prefetch_row(const void* row, int lines) {
  if (lines == 4) return prefetch_lines<4>(row);
  if (lines == 8) return prefetch_lines<8>(row);
  prefetch_stream(row, lines);
}

// --- values
// ------------------------------------------------------------------------------------------

// Rows to be read soon, fetched in the order they lie in memory while another block is worked on:
// spread over the work, because a burst would wait for room among the misses under way. Scattered
// rows are fetched whole, because parts mislead the hardware's prefetcher.
template <class T>
struct Ahead {
  const T* const* rows;
  int count;       // rows
  int lines;       // of a row
  int step;        // lines fetched with each key of a value tile
  bool adjoining;  // each row begins where the one before ends
  int row, line;   // next

  // `tiles` value tiles pass over the block that is worked on.
  VP_INLINE Ahead make(const T* const* rows, int count, bool adjoining, int dim, int tiles) {
    const int lines = (dim * static_cast<int>(sizeof(T)) + kLine - 1) / kLine;
    return {rows, count, lines, (lines + tiles - 1) / tiles, adjoining, 0, 0};
  }
  // Whole rows.
  VP_INLINE void fetch_rows(const Ahead& a, int first, int end) {
    end = end < a.count ? end : a.count;
    if (first >= end) return;
    if (a.adjoining) return prefetch_stream(a.rows[first], (end - first) * a.lines);
    for (int i = first; i < end; ++i) prefetch_row(a.rows[i], a.lines);
  }
  // One step.
  VP_INLINE void fetch_next(Ahead& a) {
    if (a.row == a.count) return;
    prefetch_stream(reinterpret_cast<const char*>(a.rows[a.row]) + a.line * kLine, a.step);
    a.line += a.step;
    if (a.line < a.lines) return;
    a.line = 0;
    ++a.row;
  }
  // As many steps as there are keys.
  VP_INLINE void fetch_scattered(Ahead& a, int keys) {
    for (a.line += keys * a.step; a.line >= a.lines && a.row < a.count; a.line -= a.lines)
      prefetch_row(a.rows[a.row++], a.lines);
  }
};

// acc[h] = acc[h] * alpha[h] + sum over keys of p[key, h] * v[key], for NH heads and UNITS units of
// columns. Each block is summed from zero and then added, which also keeps rounding errors short.
template <class T, int HT, int NH, int UNITS, bool TAIL>
VP_INLINE void value_tile(const T* const* values, int keys, Ahead<T>& ahead, const float* p,
                          int p_stride, int dim, int column, const float* alpha, float* acc,
                          int acc_stride) {
  constexpr int kTileKeys = kLanes / HT;
  Ahead<T> soon = ahead;  // in registers
  Vec sum[NH][2 * UNITS];
  for (int h = 0; h < NH; ++h)
    for (int u = 0; u < 2 * UNITS; ++u) sum[h][u] = vzero();
  for (int first = 0; first < keys; first += kTileKeys, p += p_stride) {
    const int n = keys - first < kTileKeys ? keys - first : kTileKeys;
    if (!soon.adjoining) Ahead<T>::fetch_scattered(soon, n);
    for (int i = 0; i < n; ++i) {
      if (soon.adjoining) Ahead<T>::fetch_next(soon);
      const T* v = values[first + i] + column;
      Vec x[2 * UNITS];
      for (int u = 0; u < UNITS; ++u) {
        if (TAIL) {
          load_tail(v + u * kUnit, dim - column, x[2 * u], x[2 * u + 1]);
        } else {
          load_unit(v + u * kUnit, x[2 * u], x[2 * u + 1]);
        }
      }
      for (int h = 0; h < NH; ++h) {
        const Vec weight = vset(p[i * HT + h]);
        for (int u = 0; u < 2 * UNITS; ++u) sum[h][u] = vfma(weight, x[u], sum[h][u]);
      }
    }
  }
  ahead = soon;
  for (int h = 0; h < NH; ++h) {
    float* to = acc + h * acc_stride + column;
    const Vec scale = vset(alpha[h]);
    for (int u = 0; u < 2 * UNITS; ++u)
      vstore(to + u * kWidth, vfma(vload(to + u * kWidth), scale, sum[h][u]));
  }
}

// The value tiles of a block.
VP_INLINE int value_tiles(int group, int dim) {
  const int units = dim / kUnit;
  const int across = units / kValueUnits + units % kValueUnits + (dim % kUnit != 0);
  return (group + 3) / 4 * across;
}

template <class T, int HT, int NH>
VP_INLINE void value_columns(const T* const* values, int keys, Ahead<T>& ahead, const float* p,
                             int p_stride, int dim, const float* alpha, float* acc,
                             int acc_stride) {
  int d = 0;
  for (; d + kValueUnits * kUnit <= dim; d += kValueUnits * kUnit)
    value_tile<T, HT, NH, kValueUnits, false>(values, keys, ahead, p, p_stride, dim, d, alpha, acc,
                                              acc_stride);
  for (; kValueUnits > 1 && d + kUnit <= dim; d += kUnit)
    value_tile<T, HT, NH, 1, false>(values, keys, ahead, p, p_stride, dim, d, alpha, acc,
                                    acc_stride);
  if (d < dim)
    value_tile<T, HT, NH, 1, true>(values, keys, ahead, p, p_stride, dim, d, alpha, acc,
                                   acc_stride);
}

// One head tile of `heads` <= HT real heads.
template <class T, int HT>
static void add_values(const T* const* values, int keys, Ahead<T>& ahead, const float* p,
                       int p_stride, int dim, int heads, const float* alpha, float* acc,
                       int acc_stride) {
  if (heads == 1) {
    value_columns<T, HT, 1>(values, keys, ahead, p, p_stride, dim, alpha, acc, acc_stride);
  } else if (HT >= 2 && heads == 2) {
    value_columns<T, HT, HT >= 2 ? 2 : 1>(values, keys, ahead, p, p_stride, dim, alpha, acc,
                                          acc_stride);
  } else if (HT == 4 && heads == 3) {
    value_columns<T, HT, HT == 4 ? 3 : 1>(values, keys, ahead, p, p_stride, dim, alpha, acc,
                                          acc_stride);
  } else {
    value_columns<T, HT, HT == 4 ? 4 : 1>(values, keys, ahead, p, p_stride, dim, alpha, acc,
                                          acc_stride);
  }
}

}  // namespace visionpulse::cpu::VP_ISA
