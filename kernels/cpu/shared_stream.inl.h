// SPDX-License-Identifier: Apache-2.0
// The pass over K and V for several queries of a row: one part of one KV head, block after block.
//
// Its heads are those of every query in turn, query * group + head. A lane holds a head, so nothing
// is summed across lanes: a key's elements are repeated over a register and meet the same elements
// of kWidth heads. The logits x of a tile of up to kLanes heads are [keys, NV registers]. Keys and
// values are brought into the layout of the arithmetic once for all tiles: see Staged.
#pragma once

#include "kernels/common/visual_spans.h"
#include "kernels/cpu/lanewise.inl.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kHeadSums = kWidth == 8 ? 8 : 16;  // registers of dot products in flight
template <int NV>
constexpr int kStepKeys = kHeadSums / (NV == 3 ? 4 : NV);  // keys of a step: they divide a block
constexpr int kDepth = kWidth == 16 ? 4 : 1;  // steps along D for each time a key's address loads

// Whether a vector is used where it lies: it has the type of the arithmetic and whole units.
template <class T>
VP_INLINE bool lies_ready(int dim) {
  return sizeof(T) == sizeof(Element<T>) && dim % kUnit == 0;
}

// A vector of K in the order of load_unit, padded with zeros to whole units.
template <class T>
VP_INLINE void stage_vector(const T* from, int dim, Element<T>* to) {
  constexpr int kColumns = Dot<T>::kColumns;
  int d = 0;
  for (; d + kColumns <= dim; d += kColumns) Dot<T>::store(to + d, Dot<T>::key(from + d));
  if (d < dim) Dot<T>::store(to + d, Dot<T>::key_tail(from + d, dim - d));
}

// Q of the heads of a KV head, [tiles of kLanes heads, D / kStep, lanes, kStep]: what `dot_heads`
// loads. The lanes past the last head hold zeros.
template <class T>
static void pack_queries(const Call& c, int cache_row, int kv_head) {
  constexpr int kStep = Lanewise<T>::kStep, kColumns = Dot<T>::kColumns;
  const SharedPass& pass = c.passes[cache_row];
  const int group = c.H / c.G, columns = key_columns<T>(c.D);
  const int64_t first = cache_row * c.q_stride.row + int64_t{kv_head} * group * c.q_stride.head;
  auto* packed = static_cast<Element<T>*>(pass.q) + int64_t{kv_head} * pass.padded * columns;
  alignas(64) Element<T> staged[kMaxHeadDim + kUnit];
  for (int r = 0; r < pass.padded; ++r) {
    const int tile = r / kLanes * kLanes, lane = r - tile;
    const int lanes = pass.padded - tile < kLanes ? pass.padded - tile : kLanes;
    if (r < pass.count) {
      const int64_t query = pass.first + r / group;
      const int64_t at = first + query * c.queries.q_stride + r % group * c.q_stride.head;
      for (int d = 0; d < c.D; d += kColumns)
        QueryUnit<T>::load(c, at + d, c.D - d < kColumns ? c.D - d : kColumns, staged + d);
    } else {
      for (int d = 0; d < columns; ++d) staged[d] = Element<T>{};
    }
    auto* to = packed + int64_t{tile} * columns + lane * kStep;
    for (int d = 0; d < columns; ++d) to[d / kStep * lanes * kStep + d % kStep] = staged[d];
  }
}

// A block's keys and values as the arithmetic takes them.
template <class T>
struct Staged {
  const Element<T>* k[kBlock];
  const float* v[kBlock];  // of each step [padded D]: a key's values, or pairs of two keys'
  alignas(64) Element<T> k_space[kBlock * kMaxHeadDim];
  alignas(64) float v_space[kBlock / Lanewise<T>::kStep * kMaxHeadDim];
};

template <class T>
VP_INLINE void stage_keys(const BlockKeys<T>& keys, int dim, Staged<T>& to) {
  const bool ready = lies_ready<T>(dim);
  const int columns = key_columns<T>(dim);
  for (int i = 0; i < keys.count; ++i) {
    Element<T>* space = to.k_space + i * columns;
    if (!ready) stage_vector(keys.k[i], dim, space);
    to.k[i] = ready ? reinterpret_cast<const Element<T>*>(keys.k[i]) : space;
  }
  // a partial tile repeats its last key, so every logit comes from the same instructions
  for (int i = keys.count; i < kBlock; ++i) to.k[i] = to.k[keys.count - 1];
}

VP_INLINE void store_value(float* to, Vec x) { vstore(to, x); }
#if defined(VP_HAS_PAIR_DOT)
VP_INLINE void store_value(float* to, Pairs x) { __builtin_memcpy(to, &x, sizeof x); }
VP_INLINE Pairs load_value(const float* p, const Pairs*) {
  return load_pairs(reinterpret_cast<const bf16*>(p));
}
#endif
VP_INLINE Vec load_value(const float* p, const Vec*) { return vload(p); }

template <class T, int UNITS>
VP_INLINE void stage_units(const T* const* v, int column, float* to) {
  typename Weigh<T>::Value x[2 * UNITS];
  Weigh<T>::template load<UNITS>(v, column, x);
  for (int u = 0; u < 2 * UNITS; ++u) store_value(to + column + u * kWidth, x[u]);
}

template <class T>
VP_INLINE void stage_values(BlockKeys<T>& keys, int dim, Staged<T>& to) {
  using W = Weigh<T>;
  static_assert(W::kKeys == Lanewise<T>::kStep, "a step of V has as many keys as one of K columns");
  const int columns = padded_dim(dim, kUnit), whole = dim / kUnit * kUnit;
  if (sizeof(T) == sizeof(float) && whole == dim) {
    for (int i = 0; i < keys.count; ++i) to.v[i] = reinterpret_cast<const float*>(keys.v[i]);
    return;
  }
  if (W::kKeys == 2 && keys.count % 2 != 0) keys.v[keys.count] = reinterpret_cast<const T*>(kZeros);
  for (int i = 0; i < keys.count; i += W::kKeys) {
    float* space = to.v_space + i / W::kKeys * columns;
    // in the units of sum_heads, whose order merge takes back
    int d = 0;
    for (; d + kValueUnits * kUnit <= dim; d += kValueUnits * kUnit)
      stage_units<T, kValueUnits>(keys.v + i, d, space);
    for (; kValueUnits > 1 && d + kUnit <= dim; d += kUnit) stage_units<T, 1>(keys.v + i, d, space);
    if (d < dim) {
      typename W::Value a, b;
      W::load_rest(keys.v + i, d, dim - d, a, b);
      store_value(space + d, a);
      store_value(space + d + kWidth, b);
    }
    to.v[i / W::kKeys] = space;
  }
  if constexpr (Lanewise<T>::kWholeBlocks) {
    const int steps = (keys.count + W::kKeys - 1) / W::kKeys;
    clear(to.v_space + steps * columns, (kBlock / W::kKeys - steps) * columns);
  }
}

// Dot products x [keys, NV registers] of the keys of a block with NV registers of heads.
template <class T, int NV>
VP_INLINE void dot_heads(const Element<T>* q, const Element<T>* const* k, int keys, int columns,
                         const Scaling& scaling, Prefetch<T>& prefetch, float* x) {
  using L = Lanewise<T>;
  constexpr int kKeys = kStepKeys<NV>, kStep = L::kStep;
  for (int first = 0; first < keys; first += kKeys) {
    Vec sum[kKeys][NV];
    for (int n = 0; n < kKeys; ++n)
      for (int v = 0; v < NV; ++v) sum[n][v] = vzero();
#pragma GCC unroll 1
    for (int d = 0; d < columns; d += kDepth * kStep) {
      Prefetch<T>::fetch(prefetch, kKeys);
      typename L::Factor heads[kDepth][NV];
      for (int s = 0; s < kDepth; ++s)
        for (int v = 0; v < NV; ++v)
          heads[s][v] = L::load(q + ((d / kStep + s) * NV + v) * kWidth * kStep);
#pragma GCC unroll 16
      for (int n = 0; n < kKeys; ++n) {
        const Element<T>* key = k[first + n] + d;
        for (int s = 0; s < kDepth; ++s) {
          const auto repeated = L::repeat(key + s * kStep);
          for (int v = 0; v < NV; ++v) sum[n][v] = L::add(sum[n][v], heads[s][v], repeated);
        }
      }
    }
    for (int n = 0; n < kKeys; ++n)
      for (int v = 0; v < NV; ++v)
        vstore(x + ((first + n) * NV + v) * kWidth, logit(sum[n][v], scaling));
  }
}

// The running statistics of the heads from one tile on.
struct HeadStates {
  float *m, *l, *text, *visual;
};

// Turns the logits x [keys, NV registers] of a tile into weights in place. `keys` is a multiple of
// 4: four chains are summed beside each other, and in a fixed order.
template <int NV>
VP_INLINE void softmax_heads(float* x, int keys, const BlockVisual& block, const SoftmaxArgs& a,
                             const HeadStates& s, float* rescale) {
  constexpr int kChains = 4;
  const Vec inverse = vset(a.inv_tau);
  for (int v = 0; v < NV; ++v) {
    const int lane = v * kWidth;
    const Vec old = vload(s.m + lane);
    Vec most[kChains];
    for (int i = 0; i < kChains; ++i) most[i] = old;
    for (int n = 0; n < keys; n += kChains)
      for (int i = 0; i < kChains; ++i)
        most[i] = vmax_number(vload(x + (n + i) * NV * kWidth + lane), most[i]);
    Vec m = vmax_number(vmax_number(most[0], most[1]), vmax_number(most[2], most[3]));
    vstore(s.m + lane, m);
    m = vsafe_max(m);
    const Vec exponent = vsub(old, m);
    if (a.at_tau) {
      Vec sums[2] = {vzero(), vzero()};
      for (int n = 0; n < keys; ++n) {
        const bool visual = block.content == Content::kMixed ? block.visual_lanes[n] != 0
                                                             : block.content == Content::kVisual;
        const Vec e = exp2_mass(vmul(vsub(vload(x + n * NV * kWidth + lane), m), inverse));
        sums[visual] = vadd(sums[visual], e);
      }
      const Vec scale = exp2_full(vmul(exponent, inverse));
      vstore(s.text + lane, vfma(vload(s.text + lane), scale, sums[0]));
      vstore(s.visual + lane, vfma(vload(s.visual + lane), scale, sums[1]));
    }
    const Vec scale = exp2_full(exponent);
    vstore(rescale + lane, scale);
    Vec sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = vzero();
    for (int n = 0; n < keys; n += kChains) {
      for (int i = 0; i < kChains; ++i) {
        float* at = x + (n + i) * NV * kWidth + lane;
        const Vec e = exp2_full(vsub(vload(at), m));
        vstore(at, e);
        sum[i] = vadd(sum[i], e);
      }
    }
    const Vec all = vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3]));
    vstore(s.l + lane, vfma(vload(s.l + lane), scale, all));
  }
}

// acc[h] = acc[h] * rescale[h] + sum over steps of p[step, h] * v[step], for HEADS heads and UNITS
// units of columns. A block is summed from zero and then added.
template <class T, int HEADS, int UNITS>
VP_INLINE void value_heads(const float* const* v, int steps, const float* p, int lanes, int column,
                           const float* rescale, float* acc, int columns) {
  using L = Lanewise<T>;
  typename L::Factor* const kind = nullptr;
  Vec sum[HEADS][2 * UNITS];
  for (int r = 0; r < HEADS; ++r)
    for (int u = 0; u < 2 * UNITS; ++u) sum[r][u] = vzero();
  for (int i = 0; i < steps; ++i) {
    typename L::Factor value[2 * UNITS];
    for (int u = 0; u < 2 * UNITS; ++u) value[u] = load_value(v[i] + column + u * kWidth, kind);
    for (int r = 0; r < HEADS; ++r) {
      const auto weight = L::repeat_weight(p + i * lanes + r);
      for (int u = 0; u < 2 * UNITS; ++u) sum[r][u] = L::add(sum[r][u], weight, value[u]);
    }
  }
  for (int r = 0; r < HEADS; ++r) {
    float* to = acc + r * columns + column;
    const Vec scale = vset(rescale[r]);
    for (int u = 0; u < 2 * UNITS; ++u)
      vstore(to + u * kWidth, vfma(vload(to + u * kWidth), scale, sum[r][u]));
  }
}

// The sums of V of one tile: four heads at a time, the padding of the last four with them.
template <class T>
VP_INLINE void sum_heads(const Staged<T>& staged, int keys, float* x, int lanes, int heads,
                         const float* rescale, float* acc, int columns) {
  constexpr int kHeads = 4, kStep = Lanewise<T>::kStep, kColumns = kValueUnits * kUnit;
#if defined(VP_HAS_PAIR_DOT)
  if (kStep == 2) pack_neighbours(x, lanes, (keys + 1) / 2 * 2);
#endif
  const int steps = (keys + kStep - 1) / kStep;
  for (int r = 0; r < heads; r += kHeads) {
    int d = 0;
    for (; d + kColumns <= columns; d += kColumns)
      value_heads<T, kHeads, kValueUnits>(staged.v, steps, x + r, lanes, d, rescale + r,
                                          acc + r * columns, columns);
    for (; kValueUnits > 1 && d < columns; d += kUnit)
      value_heads<T, kHeads, 1>(staged.v, steps, x + r, lanes, d, rescale + r, acc + r * columns,
                                columns);
  }
}

// -inf where a head must not see a key: past its own key, before its window, on a missing
// page, and in the lanes of no key up to `whole`.
template <class T>
VP_INLINE void hide_keys(const Call& c, int cache_row, const BlockKeys<T>& keys, int from,
                         int whole, int first_head, int lanes, float* x) {
  const SharedPass& pass = c.passes[cache_row];
  for (int n = 0; n < whole; ++n) {
    if (n < keys.count && !(keys.any_missing && keys.missing[n])) continue;
    for (int i = 0; i < lanes; ++i) x[n * lanes + i] = minus_infinity();
  }
  if (from >= pass.common.begin && from + keys.count <= pass.common.end) return;
  const int group = c.H / c.G;
  const Row* queries = c.rows + int64_t{cache_row} * c.queries.count + pass.first;
  const int end_head = first_head + lanes < pass.count ? first_head + lanes : pass.count;
  for (int r = first_head; r < end_head; ++r) {
    const Range visible = queries[r / group].visible;
    for (int n = 0; n < keys.count; ++n)
      if (from + n < visible.begin || from + n >= visible.end)
        x[n * lanes + r - first_head] = minus_infinity();
  }
}

// One block for the tile of NV registers that begins at `first_head`.
template <class T, int NV>
static void tile_of_heads(const Call& c, int cache_row, int kv_head, const BlockKeys<T>& keys,
                          int first, const Staged<T>& staged, const BlockVisual& visual,
                          const SoftmaxArgs& args, const Scaling& scaling, Prefetch<T>& prefetch,
                          int first_head, const Part& part) {
  constexpr int kKeys = kStepKeys<NV>, lanes = NV * kWidth;
  const SharedPass& pass = c.passes[cache_row];
  const int columns = padded_dim(c.D, kUnit), q_columns = key_columns<T>(c.D);
  const int whole = (keys.count + kKeys - 1) / kKeys * kKeys;
  const auto* q = static_cast<const Element<T>*>(pass.q) +
                  (int64_t{kv_head} * pass.padded + first_head) * q_columns;
  alignas(64) float x[kBlock * kLanes], rescale[kLanes];
  dot_heads<T, NV>(q, staged.k, whole, q_columns, scaling, prefetch, x);
  hide_keys(c, cache_row, keys, pass.seen.begin + first, whole, first_head, lanes, x);
  if (args.at_tau && (c.store_all_logits || visual.content != Content::kText)) {
    float* to = pass.stored_logits + (int64_t{kv_head} * pass.padded_keys + first) * pass.padded +
                first_head;
    for (int n = 0; n < keys.count; ++n, to += pass.padded)
      for (int v = 0; v < lanes; v += kWidth) vstore(to + v, vload(x + n * lanes + v));
  }
  const HeadStates states = {part.m + first_head, part.l + first_head, part.text + first_head,
                             part.visual + first_head};
  softmax_heads<NV>(x, whole, visual, args, states, rescale);
  if (!c.with_values) return;
  const int left = pass.count - first_head < lanes ? pass.count - first_head : lanes;
  sum_heads(staged, keys.count, x, lanes, left, rescale, part.acc + int64_t{first_head} * columns,
            columns);
}

template <class T>
static void stream_shared(const Call& c, int cache_row, int kv_head, int index, Run run) {
  const Cut& cut = c.cuts[cache_row];
  const SharedPass& pass = c.passes[cache_row];
  const int columns = padded_dim(c.D, kUnit), tiles = (pass.padded + kLanes - 1) / kLanes;
  const PartRange range = range_of_part(cut, index);
  const Part part = part_at(c, part_index(cut, kv_head, index));
  const Scaling scaling = scaling_of(c.score, factor_of<T>(c.cache.k_scale, kv_head));
  const SoftmaxArgs args = {1.0f / c.score.tau, c.store_logits};
  for (int r = 0; r < pass.padded; ++r) {
    part.m[r] = minus_infinity();
    part.l[r] = part.text[r] = part.visual[r] = 0.0f;
  }
  if (c.with_values) clear(part.acc, int64_t{pass.padded} * columns);
  BlockVisual visual;
  visual.content = Content::kText;
  const int32_t* spans = c.visual.spans + int64_t{cache_row} * c.visual.spans_per_row * 2;
  int span = args.at_tau ? span_after(spans, c.visual.spans_per_row, cut.begin + range.begin) : 0;

  constexpr int block =
      sizeof(T) > 2 ? kBlock / 2 : kBlock;  // the same bytes in types of 16 and 32 bits
  BlockKeys<T> buffers[2];
  Staged<T> staged;
  locate(c, cut, cache_row, kv_head, range.begin, range.end, block, buffers[0]);
  for (int first = range.begin, turn = 0; first < range.end; first += block, turn ^= 1) {
    BlockKeys<T>& keys = buffers[turn];
    BlockKeys<T>& next = buffers[turn ^ 1];
    if (first + block < range.end || run.is_last) {
      locate(c, cut, cache_row, kv_head, first + block, range.end, block, next);
    } else {
      locate_next_part(c, cut, cache_row, kv_head, index, block, next);
    }
    // a few lines at each step along D: a burst would fill the miss buffers
    const int passes = tiles * (key_columns<T>(c.D) / (kDepth * Lanewise<T>::kStep));
    Prefetch<T> prefetch =
        Prefetch<T>::make(next.k, c.with_values ? next.v : nullptr, next.count, c.D, passes);
    stage_keys(keys, c.D, staged);
    if (c.with_values) stage_values(keys, c.D, staged);
    if (args.at_tau)
      find_visual<1>(c.visual, cache_row, cut.begin + first, keys.count, span, visual);
    constexpr int kPair = kTileVecs >= 2 ? 2 : 1, kThree = kTileVecs == 4 ? 3 : 1;
    const auto tile = [&](auto entry, int head) {
      entry(c, cache_row, kv_head, keys, first, staged, visual, args, scaling, prefetch, head,
            part);
    };
    for (int head = 0; head < pass.padded; head += kLanes) {
      const int registers = (pass.padded - head) / kWidth;
      if (registers >= kTileVecs) {
        tile(tile_of_heads<T, kTileVecs>, head);
      } else if (registers == 1) {
        tile(tile_of_heads<T, 1>, head);
      } else if (registers == 2) {
        tile(tile_of_heads<T, kPair>, head);
      } else {
        tile(tile_of_heads<T, kThree>, head);
      }
    }
  }
}

}  // namespace visionpulse::cpu::VP_ISA
