// SPDX-License-Identifier: Apache-2.0
// Attention over one part of a row: dense, over kept positions, or from kept logits; and the merge.
#pragma once

#include "kernels/cpu/softmax.inl.h"

namespace visionpulse::cpu::VP_ISA {

// Where the keys of a block lie. A page id outside the pool makes its keys "missing": they read
// zeros and weigh nothing.
template <class T>
struct Keys {
  const T* k[kGather];
  const T* v[kGather];
  int32_t position[kGather];
  int count;
  bool missing[kGather];
  bool any_missing;
  bool adjoining;  // rows of K and of V lie one behind the other, in whole cache lines
};

alignas(64) static const uint32_t kZeroRow[kMaxHeadDim] = {};

template <class T>
VP_INLINE void locate_pages(const Call& c, int row, int kv_head, Keys<T>& keys) {
  const CacheArgs& a = c.cache;
  const int32_t* table = a.table + row * a.table_stride;
  const T* k = static_cast<const T*>(a.k) + kv_head * a.k_stride.head;
  const T* v = static_cast<const T*>(a.v) + kv_head * a.v_stride.head;
  int32_t previous = -2, slot = 0, page = 0;
  for (int i = 0; i < keys.count; ++i) {
    const int32_t n = keys.position[i];
    // a division per key would show: neighbours share their page
    if (n == previous + 1 && slot + 1 < a.page_size) {
      ++slot;
    } else {
      page = table[n / a.page_size];
      slot = n % a.page_size;
    }
    previous = n;
    keys.missing[i] = page < 0 || page >= a.pages;
    keys.any_missing |= keys.missing[i];
    const T* zero = reinterpret_cast<const T*>(kZeroRow);
    keys.k[i] = keys.missing[i] ? zero : k + page * a.k_stride.outer + slot * a.k_stride.token;
    keys.v[i] = keys.missing[i] ? zero : v + page * a.v_stride.outer + slot * a.v_stride.token;
  }
}

// The keys of a block: those of a stream fill as many bytes in every type.
template <class T>
VP_INLINE int block_of(const Cut& cut) {
  return cut.kept != nullptr ? kGather : kBlock * 2 / static_cast<int>(sizeof(T));
}

// A block of a cut: the keys from `first` on, as far as `end`.
template <class T>
VP_INLINE void locate(const Call& c, const Cut& cut, int row, int kv_head, int first, int end,
                      Keys<T>& keys) {
  const int block = block_of<T>(cut);
  keys.count = end - first < block ? (end > first ? end - first : 0) : block;
  keys.any_missing = keys.adjoining = false;
  if (cut.kept != nullptr) {
    for (int i = 0; i < keys.count; ++i) keys.position[i] = cut.kept[first + i];
  } else {
    for (int i = 0; i < keys.count; ++i) keys.position[i] = cut.begin + first + i;
  }
  const CacheArgs& a = c.cache;
  if (a.table != nullptr) return locate_pages(c, row, kv_head, keys);
  keys.adjoining = cut.kept == nullptr && a.k_stride.token == c.D && a.v_stride.token == c.D &&
                   c.D * sizeof(T) % kLine == 0;
  const T* k = static_cast<const T*>(a.k) + row * a.k_stride.outer + kv_head * a.k_stride.head;
  const T* v = static_cast<const T*>(a.v) + row * a.v_stride.outer + kv_head * a.v_stride.head;
  for (int i = 0; i < keys.count; ++i) {
    keys.k[i] = k + keys.position[i] * a.k_stride.token;
    keys.v[i] = v + keys.position[i] * a.v_stride.token;
  }
}

// Logits [tiles, head tiles, kLanes] of a block; lanes without a key get -inf.
template <class T, int HT>
VP_INLINE void dot_block(const Query<T>& q, Keys<T>& keys, int dim, int tiles_of_heads,
                         const Scaling& scaling, const Ahead<T>& ahead, float* x) {
  constexpr int kTileKeys = kLanes / HT, kDotKeys = kDotLanes / HT;
  const int whole = (keys.count + kTileKeys - 1) / kTileKeys * kTileKeys;
  // a partial tile repeats its last key: every logit comes from the same instructions
  for (int i = keys.count; i < whole; ++i) keys.k[i] = keys.k[keys.count - 1];
  for (int first = 0; first < whole; first += kDotKeys) {
    Ahead<T>::fetch_rows(ahead, first, first + kDotKeys);
    for (int t = 0; t < tiles_of_heads; ++t) {
      Vec out[kDotVecs];
      const auto* heads = q.data + t * HT * q.stride;
      if (dim == 128) {
        dot_tile<T, HT, 128>(heads, q.stride, keys.k + first, dim, out);
      } else {
        dot_tile<T, HT, 0>(heads, q.stride, keys.k + first, dim, out);
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

// One part's statistics and sums, in memory as [4, padded heads] then [group, padded D].
struct Part {
  float *m, *l, *text, *visual, *acc;
};

VP_INLINE Part part_at(const Call& c, int64_t index) {
  const int heads = padded_heads(c.H / c.G);
  float* p = c.parts + index * c.part_floats;
  return {p, p + heads, p + 2 * heads, p + 3 * heads,
          p + (4 * heads + kLanes - 1) / kLanes * kLanes};
}

VP_INLINE int64_t part_index(const Cut& cut, int kv_head, int part) {
  return cut.first + int64_t{kv_head} * cut.splits + part;
}

template <int HT>
VP_INLINE void store_part(const TileState* tiles, int count, const Part& part) {
  for (int t = 0; t < count; ++t) {
    for (int h = 0; h < HT; ++h) {
      float l = 0.0f, text = 0.0f, visual = 0.0f;
      for (int i = h; i < kLanes; i += HT) {
        l += tiles[t].l[i];
        text += tiles[t].text[i];
        visual += tiles[t].visual[i];
      }
      part.m[t * HT + h] = tiles[t].m[h];
      part.l[t * HT + h] = l;
      part.text[t * HT + h] = text;
      part.visual[t * HT + h] = visual;
    }
  }
}

// What the sums so far shrink by, for each head tile.
struct Alphas {
  alignas(64) float tile[kMaxGroup / 4][kLanes];
};

// The statistics of a block, whose logits become weights.
template <int HT>
VP_INLINE void weigh_block(int tiles, int keys, const BlockVisual* which, const SoftmaxArgs& a,
                           float* x, TileState* states, Alphas& alphas) {
  constexpr int kTileKeys = kLanes / HT;
  const int key_tiles = (keys + kTileKeys - 1) / kTileKeys;
  for (int t = 0; t < tiles; ++t)
    softmax_tile<HT>(x + t * kLanes, tiles * kLanes, key_tiles, which, a, states[t],
                     alphas.tile[t]);
}

// Its weighted sum of V.
template <class T, int HT>
VP_INLINE void sum_block(const Call& c, const Keys<T>& keys, Ahead<T> ahead, const float* x,
                         const Alphas& alphas, const Part& part) {
  const int group = c.H / c.G, tiles = head_tiles(group), columns = padded_dim(c.D, kUnit);
  for (int t = 0; t < tiles; ++t) {
    const int heads = group - t * HT < HT ? group - t * HT : HT;
    add_values<T, HT>(keys.v, keys.count, ahead, x + t * kLanes, tiles * kLanes, c.D, heads,
                      alphas.tile[t], part.acc + t * HT * columns, columns);
  }
}

VP_INLINE void clear(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0.0f;
}

template <class T>
VP_INLINE void fetch_all(const T* const* rows, int count, int dim) {
  const int lines = (dim * static_cast<int>(sizeof(T)) + kLine - 1) / kLine;
  for (int i = 0; i < count; ++i) prefetch_row(rows[i], lines);
}

// The logits of a block, kept for the scores and for the weights of a second pass.
VP_INLINE void keep_logits(const Call& c, const Row& row, int kv_head, int first, const float* x,
                           int floats) {
  const int heads = padded_heads(c.H / c.G);
  float* to = row.logits + (int64_t{kv_head} * row.padded + first) * heads;
  for (int i = 0; i < floats; i += kWidth) vstore(to + i, vload(x + i));
}

template <class T, int HT>
static void stream_part(const Call& c, int row, int kv_head, int index) {
  const Cut& cut = c.cuts[row];
  const int group = c.H / c.G, tiles = head_tiles(group), heads = tiles * HT;
  const int begin = index * cut.split;
  const int end = cut.keys < begin + cut.split ? cut.keys : begin + cut.split;
  const Part part = part_at(c, part_index(cut, kv_head, index));
  const Scaling scaling = scaling_of(c.score);
  const SoftmaxArgs args = {1.0f / c.score.tau, c.keep_logits};
  Query<T> q;
  Query<T>::load(q, c, row, kv_head);
  TileState states[kMaxGroup / 4];
  for (int t = 0; t < tiles; ++t) TileState::reset(states[t]);
  if (c.with_values) clear(part.acc, int64_t{group} * padded_dim(c.D, kUnit));
  BlockVisual which;
  which.content = Content::kText;
  const int32_t* spans = c.visual.spans + int64_t{row} * c.visual.spans_per_row * 2;
  int span = args.at_tau ? span_after(spans, c.visual.spans_per_row, cut.begin + begin) : 0;

  const int block = block_of<T>(cut), tiles_of_values = value_tiles(group, c.D);
  alignas(64) float x[kGather * kMaxGroup];
  Alphas alphas;
  Keys<T> buffers[2];
  locate(c, cut, row, kv_head, begin, end, buffers[0]);
  // the hardware's prefetcher finds the first rows of a stream, but not scattered ones
  if (cut.kept != nullptr) fetch_all(buffers[0].k, buffers[0].count, c.D);
  for (int first = begin, turn = 0; first < end; first += block, turn ^= 1) {
    Keys<T>& keys = buffers[turn];
    Keys<T>& next = buffers[turn ^ 1];
    locate(c, cut, row, kv_head, first + block, end, next);
    // half a block ahead: V of this block while its K is multiplied, the next K while V is summed
    const Ahead<T> soon = c.with_values
                              ? Ahead<T>::make(keys.v, keys.count, keys.adjoining, c.D, 1)
                              : Ahead<T>::make(next.k, next.count, next.adjoining, c.D, 1);
    dot_block<T, HT>(q, keys, c.D, tiles, scaling, soon, x);
    if (args.at_tau) {
      find_visual<HT>(c.visual, row, cut.begin + first, keys.count, span, which);
      const int floats = (keys.count + kLanes / HT - 1) / (kLanes / HT) * (kLanes / HT) * heads;
      if (c.all_logits || which.content != Content::kText)
        keep_logits(c, c.rows[row], kv_head, first, x, floats);
    }
    weigh_block<HT>(tiles, keys.count, &which, args, x, states, alphas);
    if (c.with_values)
      sum_block<T, HT>(c, keys,
                       Ahead<T>::make(next.k, next.count, next.adjoining, c.D, tiles_of_values), x,
                       alphas, part);
  }
  store_part<HT>(states, tiles, part);
}

// Where the kept logits of position n lie: of HT heads, then a head tile further those of the next.
template <int HT>
VP_INLINE const float* logits_at(const Row& row, int kv_head, int tiles, int n) {
  constexpr int kTileKeys = kLanes / HT;
  const int key = n - row.visible.begin;
  return row.logits + int64_t{kv_head} * row.padded * (tiles * HT) +
         int64_t{key / kTileKeys} * tiles * kLanes + key % kTileKeys * HT;
}

template <class T, int HT>
VP_INLINE void fetch_logits(const Row& row, int kv_head, const Keys<T>& keys, int tiles) {
  for (int i = 0; i < keys.count; ++i)
    __builtin_prefetch(logits_at<HT>(row, kv_head, tiles, keys.position[i]), 0, 3);
}

// The kept logits of a block's keys, in the order that dot_block gives.
template <class T, int HT>
VP_INLINE void gather_logits(const Row& row, int kv_head, const Keys<T>& keys, int tiles,
                             float* x) {
  constexpr int kTileKeys = kLanes / HT;
  const int whole = (keys.count + kTileKeys - 1) / kTileKeys * kTileKeys;
  for (int i = 0; i < whole; ++i) {
    float* to = x + i / kTileKeys * tiles * kLanes + i % kTileKeys * HT;
    const float* at = logits_at<HT>(row, kv_head, tiles, keys.position[i < keys.count ? i : 0]);
    for (int t = 0; t < tiles; ++t)
      for (int h = 0; h < HT; ++h)
        to[t * kLanes + h] = i < keys.count ? at[t * kLanes + h] : minus_infinity();
  }
}

template <class T, int HT>
static void weigh_part(const Call& c, int row, int kv_head, int index) {
  const Cut& cut = c.cuts[row];
  const int group = c.H / c.G, tiles = head_tiles(group);
  const int begin = index * cut.split;
  const int end = cut.keys < begin + cut.split ? cut.keys : begin + cut.split;
  const Part part = part_at(c, part_index(cut, kv_head, index));
  TileState states[kMaxGroup / 4];
  for (int t = 0; t < tiles; ++t) TileState::reset(states[t]);
  clear(part.acc, int64_t{group} * padded_dim(c.D, kUnit));
  alignas(64) float x[kGather * kMaxGroup];
  const int block = block_of<T>(cut), tiles_of_values = value_tiles(group, c.D);
  Alphas alphas;
  Keys<T> buffers[2];
  locate(c, cut, row, kv_head, begin, end, buffers[0]);
  fetch_logits<T, HT>(c.rows[row], kv_head, buffers[0], tiles);
  fetch_all(buffers[0].v, buffers[0].count, c.D);
  for (int first = begin, turn = 0; first < end; first += block, turn ^= 1) {
    const Keys<T>& keys = buffers[turn];
    Keys<T>& next = buffers[turn ^ 1];
    locate(c, cut, row, kv_head, first + block, end, next);
    fetch_logits<T, HT>(c.rows[row], kv_head, next, tiles);
    gather_logits<T, HT>(c.rows[row], kv_head, keys, tiles, x);
    weigh_block<HT>(tiles, keys.count, nullptr, {1.0f, false}, x, states, alphas);
    sum_block<T, HT>(c, keys,
                     Ahead<T>::make(next.v, next.count, next.adjoining, c.D, tiles_of_values), x,
                     alphas, part);
  }
  store_part<HT>(states, tiles, part);
}

// --- merge
// -------------------------------------------------------------------------------------------

VP_INLINE float exp2_one(float x) {
  alignas(64) float lanes[kWidth];
  vstore(lanes, exp2_full(vset(x)));
  return lanes[0];
}

// Element d of a row lies at this place among the accumulators: where load_unit puts it.
VP_INLINE int column_of(const void*, int d) { return d; }
VP_INLINE int column_of(const bf16*, int d) {
  const int within = d % kUnit;
  return d - within + (within & 1) * kWidth + within / 2;
}

VP_INLINE void store_as(float* to, float x) { *to = x; }
VP_INLINE void store_as(bf16* to, float x) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
// Round to nearest even, subnormals and overflow to infinity included.
VP_INLINE void store_as(f16* to, float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;
  } else if (size >= 0x477ff000u) {  // 65520, halfway to 2^16
    half = 0x7c00u;
  } else if (size < 0x38800000u) {  // 2^-14: adding 1/2 leaves the subnormal's bits at the bottom
    float shifted;
    __builtin_memcpy(&shifted, &size, sizeof shifted);
    half = float_bits(shifted + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
}

template <class T>
static void finish_head(const Call& c, int row, int kv_head) {
  const Cut& cut = c.cuts[row];
  const int group = c.H / c.G, columns = padded_dim(c.D, kUnit);
  const int64_t first = part_index(cut, kv_head, 0);
  for (int h = 0; h < group; ++h) {
    T* out = static_cast<T*>(c.out) + row * c.out_stride.row +
             (int64_t{kv_head} * group + h) * c.out_stride.head;
    float m = minus_infinity(), l = 0.0f;
    for (int s = 0; s < cut.splits; ++s) {
      const float part_m = part_at(c, first + s).m[h];
      m = part_m > m ? part_m : m;
    }
    alignas(64) float sum[kMaxHeadDim + kUnit];
    clear(sum, columns);
    for (int s = 0; s < cut.splits; ++s) {
      const Part part = part_at(c, first + s);
      const float w = exp2_one(rescale_exponent(part.m[h], m));
      l += w * part.l[h];
      for (int d = 0; d < columns; d += kWidth)
        vstore(sum + d, vfma(vset(w), vload(part.acc + h * columns + d), vload(sum + d)));
    }
    // no key, or none with a finite logit: zeros
    const float inverse = m == minus_infinity() && l == 0.0f ? 0.0f : 1.0f / l;
    for (int d = 0; d < c.D; ++d) store_as(out + d, sum[column_of(out, d)] * inverse);
  }
}

}  // namespace visionpulse::cpu::VP_ISA
