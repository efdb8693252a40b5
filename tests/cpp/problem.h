// SPDX-License-Identifier: Apache-2.0
// Random decode problems, and the contract computed for them in float64, row by row: row b * Q + i
// is query i of cache row b. Buffers have the exact size, so that a sanitizer sees an access past
// their end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "kernels/common/visual_spans.h"
#include "kernels/cpu/call.h"

namespace problem {

using namespace visionpulse;

// Its integers are the same everywhere; the distributions of the standard library, and its shuffle,
// are not, so both are made from the integers here.
using Random = std::mt19937;

inline int between(Random& r, int low, int high) {
  return low + static_cast<int>(r() % static_cast<uint32_t>(high - low + 1));
}

// Twelve uniform numbers added: mean 0, variance 1, exact in float.
inline float normal(Random& r) {
  int sum = 0;
  for (int i = 0; i < 6; ++i) {
    const uint32_t two = r();
    sum += static_cast<int>(two & 0xffff) + static_cast<int>(two >> 16);
  }
  return static_cast<float>(sum - 6 * 0xffff) / 65536.0f;
}

inline void shuffle(std::vector<int32_t>& items, Random& r) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[r() % i]);
}

inline float half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                     : exponent == 31
                         ? (mantissa != 0 ? std::nanf("") : HUGE_VALF)
                         : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return h & 0x8000 ? -size : size;
}

inline float float8_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float size = (bits & 127) == 127 ? std::nanf("")
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                     : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
  return bits & 128 ? -size : size;
}

// A flat buffer of one dtype, `count` elements and not a byte more.
struct Buffer {
  DType dtype = DType::kFloat32;
  std::vector<float> f32;
  std::vector<uint16_t> u16;
  std::vector<uint8_t> u8;

  void make(DType type, int64_t count) {
    dtype = type;
    if (type == DType::kFloat32) {
      f32.assign(count, std::nanf(""));
    } else if (type == DType::kFloat8) {
      u8.assign(count, 0x7f);  // NaN
    } else {
      u16.assign(count, 0x7fff);  // NaN in both 16-bit types
    }
  }
  void set(int64_t at, float value) {
    if (dtype == DType::kFloat32) {
      f32[at] = value;
      return;
    }
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if (dtype == DType::kBFloat16) {
      u16[at] = static_cast<uint16_t>(bits >> 16);
      return;
    }
    // values here are small: a half with the mantissa cut
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
    const uint32_t size =
        exponent <= 0 ? 0 : static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023);
    u16[at] = static_cast<uint16_t>((bits >> 16 & 0x8000) | size);
  }
  float get(int64_t at) const {
    if (dtype == DType::kFloat32) return f32[at];
    if (dtype == DType::kFloat8) return float8_value(u8[at]);
    if (dtype == DType::kFloat16) return half_value(u16[at]);
    const uint32_t bits = static_cast<uint32_t>(u16[at]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  void* data() {
    if (dtype == DType::kFloat8) return u8.data();
    return dtype == DType::kFloat32 ? static_cast<void*>(f32.data()) : u16.data();
  }
};

struct Problem {
  cpu::Call call = {};
  Buffer q, k, v, out;
  std::vector<int32_t> starts, lengths, real, table, spans, offsets, wanted;
  std::vector<int32_t> indices, counts;
  std::vector<float> mass, mass_mean, scores, ratio, scales;
  std::vector<std::vector<bool>> visual;  // [B][N] of the cache rows
  bool dense = false;

  int64_t slot(const Strides& s, int b, int g, int n) const {
    if (call.cache.table == nullptr) return b * s.outer + g * s.head + n * s.token;
    const int page = call.cache.page_size;
    return table[b * call.cache.table_stride + n / page] * s.outer + g * s.head +
           n % page * s.token;
  }
  int rows() const { return call.B * call.queries.count; }
  int cache_row(int row) const { return row / call.queries.count; }
  Range visible(int row) const {
    const CacheArgs& a = call.cache;
    const int queries = call.queries.count, b = cache_row(row), query = row % queries;
    int end = a.lengths != nullptr ? std::min(lengths[b], a.capacity) : a.capacity;
    end -= queries - 1 - query;
    if (call.queries.real != nullptr && query < queries - real[b]) end = 0;
    return visible_range(a.starts != nullptr ? starts[b] : 0, end, a.capacity, call.score.window);
  }
  // What any query of a cache row sees.
  Range seen(int b) const {
    Range all = {0, 0};
    for (int i = 0; i < call.queries.count; ++i) {
      const Range one = visible(b * call.queries.count + i);
      if (one.begin == one.end) continue;
      all = {all.begin == all.end ? one.begin : std::min(all.begin, one.begin), one.end};
    }
    return all;
  }
  // Where a head of q and of the output begins.
  int64_t head_at(int row, int h) const { return (int64_t{row} * call.H + h) * call.D; }
};

inline void draw_cache(Problem& p, Random& r, int rows, int kv_heads, int dim, int capacity) {
  CacheArgs& a = p.call.cache;
  a.capacity = capacity;
  const int gap =
      between(r, 0, 3);  // elements between tokens: strides that no vector width divides
  int64_t size;
  if (r() % 2 == 0) {
    const int64_t token = dim + gap, head = token * capacity;
    a.k_stride = a.v_stride = {head * kv_heads, head, token};
    if (r() % 2 == 0)
      a.v_stride = a.k_stride = {token * kv_heads * capacity, token, token * kv_heads};
    size = int64_t{rows} * kv_heads * capacity * token - gap;
  } else {
    a.page_size = between(r, 1, 24);
    const int pages = (capacity + a.page_size - 1) / a.page_size;
    a.capacity = pages * a.page_size;
    a.pages = rows * pages + between(r, 0, 2);
    a.table_stride = pages + between(r, 0, 2);
    p.table.assign(rows * a.table_stride, -7);
    std::vector<int32_t> ids(a.pages);
    for (int i = 0; i < a.pages; ++i) ids[i] = i;
    shuffle(ids, r);
    for (int b = 0; b < rows; ++b)
      for (int i = 0; i < pages; ++i) p.table[b * a.table_stride + i] = ids[b * pages + i];
    a.table = p.table.data();
    const int64_t token = dim + gap, page = token * kv_heads * a.page_size;
    a.k_stride = a.v_stride = {page, token, token * kv_heads};
    if (r() % 2 == 0) a.k_stride = a.v_stride = {page, token * a.page_size, token};
    size = a.pages * page - gap;
  }
  a.dtype = p.call.dtype;
  p.k.make(p.call.dtype, size);
  p.v.make(p.call.dtype, size);
  a.k = p.k.data();
  a.v = p.v.data();
}

inline void draw_visual(Problem& p, Random& r) {
  const int rows = p.call.B, size = p.call.cache.capacity;
  p.visual.assign(rows, std::vector<bool>(size, false));
  std::vector<std::vector<int32_t>> spans(rows);
  size_t most = 1;
  for (int b = 0; b < rows; ++b) {
    const int kind = between(r, 0, 4);  // none, all, scattered, few runs
    for (int n = 0; n < size;) {
      const int length = kind == 2 ? between(r, 1, 3) : between(r, 1, size / 2 + 1);
      const bool on = kind == 1 || (kind >= 2 && r() % 2 == 0);
      for (int i = n; i < std::min(size, n + length); ++i) p.visual[b][i] = on;
      n += length;
    }
    for (int n = 0; n < size; ++n) {
      if (!p.visual[b][n]) continue;
      spans[b].push_back(n);
      while (n < size && p.visual[b][n]) ++n;
      spans[b].push_back(n);
    }
    most = std::max(most, spans[b].size() / 2 + r() % 2);
  }
  for (int b = 0; b < rows; ++b) {
    int before = 0;
    for (size_t s = 0; s < most; ++s) {
      const bool used = 2 * s < spans[b].size();
      const int32_t begin = used ? spans[b][2 * s] : kNoSpan,
                    end = used ? spans[b][2 * s + 1] : kNoSpan;
      p.spans.insert(p.spans.end(), {begin, end});
      p.offsets.push_back(before);
      before += end - begin;
    }
    p.offsets.push_back(before);
  }
  p.call.visual = {p.spans.data(), p.offsets.data(), static_cast<int32_t>(most)};
}

inline void draw_budget(Problem& p, Random& r) {
  ScoreArgs& s = p.call.score;
  const int rows = p.rows();
  s.tau = r() % 2 == 0 ? 0.4f : 1.0f;
  s.r_min = 0.05f * static_cast<float>(between(r, 0, 3));
  s.r_max = s.r_min + 0.1f * static_cast<float>(between(r, 0, 8));
  if (s.r_max > 1.0f) s.r_max = 1.0f;
  s.kind = static_cast<ScoreKind>(between(r, 0, 2));
  s.mass_of = r() % 2 == 0 ? MassOf::kMean : MassOf::kMax;
  s.k_max = std::max(1, static_cast<int>(s.r_max * static_cast<float>(p.call.cache.capacity)));
  const int kind = between(r, 0, 3);
  for (int b = 0; b < rows; ++b) {
    p.ratio.push_back(b == 0 ? std::nanf("") : static_cast<float>(b) / static_cast<float>(rows));
    p.wanted.push_back(between(r, -2, s.k_max + 2));
  }
  if (kind == 1) s.ratio = p.ratio.data();
  if (kind == 2) s.wanted = p.wanted.data();
}

// Several queries of a row, of which some rows may have fewer that are real.
inline void draw_queries(Problem& p, Random& r) {
  cpu::Call& c = p.call;
  c.queries.count = between(r, 2, std::min(kMaxQueries, 64 / (c.H / c.G)));
  for (int b = 0; b < c.B; ++b) p.real.push_back(between(r, 0, c.queries.count));
  if (r() % 2 == 0) c.queries.real = p.real.data();
}

inline Problem make(Random& r) {
  Problem p;
  cpu::Call& c = p.call;
  const int groups[] = {1, 2, 3, 4, 5, 7, 8, 16, 32},
            dims[] = {8, 16, 40, 64, 72, 80, 96, 128, 192, 256, 20};
  const int group = groups[r() % 9];
  c.dtype = static_cast<DType>(between(r, 0, 2));
  c.B = between(r, 1, 3);
  c.G = group >= 16 ? 1 : between(r, 1, 3);
  c.H = c.G * group;
  c.D = dims[r() % 11];
  const int size = r() % 8 == 0 ? between(r, 300, 1400) : between(r, 1, 200);
  draw_cache(p, r, c.B, c.G, c.D, size);
  const int capacity = c.cache.capacity;
  for (int b = 0; b < c.B; ++b) {
    const int below = r() % 8 == 0 ? 5 : 0;
    p.lengths.push_back(between(r, 0, capacity + 1) - below);
    p.starts.push_back(between(r, 0, capacity / 2 + 1) - 1);
  }
  if (r() % 3 != 0) c.cache.lengths = p.lengths.data();
  if (r() % 3 == 0) c.cache.starts = p.starts.data();
  if (r() % 4 == 0) c.score.window = between(r, 1, capacity + 3);
  if (r() % 4 == 0) c.score.softcap = 3.0f;
  c.score.scale = 1.0f / std::sqrt(static_cast<float>(c.D));
  if (r() % 3 == 0) draw_queries(p, r);
  draw_visual(p, r);
  draw_budget(p, r);
  const int rows = p.rows();
  p.q.make(c.dtype, p.head_at(rows, 0));
  for (int64_t i = 0; i < p.head_at(rows, 0); ++i) p.q.set(i, normal(r));
  c.q = p.q.data();
  c.queries.q_stride = c.queries.out_stride = int64_t{c.H} * c.D;
  c.q_stride.row = c.queries.q_stride * c.queries.count;
  c.q_stride.head = c.D;
  // invisible keys stay NaN, so that a kernel that reads one fails
  for (int b = 0; b < c.B; ++b) {
    const Range seen = p.seen(b);
    for (int g = 0; g < c.G; ++g)
      for (int n = seen.begin; n < seen.end; ++n)
        for (int d = 0; d < c.D; ++d) {
          p.k.set(p.slot(c.cache.k_stride, b, g, n) + d, normal(r));
          p.v.set(p.slot(c.cache.v_stride, b, g, n) + d, normal(r));
        }
  }
  p.out.make(c.dtype, p.head_at(rows, 0));
  p.indices.assign(int64_t{rows} * c.score.k_max, -9);
  p.counts.assign(rows, -9);
  p.mass.assign(rows, -9.0f);
  p.mass_mean.assign(rows, -9.0f);
  p.scores.assign(int64_t{rows} * capacity, -9.0f);
  c.out = p.out.data();
  c.out_stride.row = c.q_stride.row;
  c.out_stride.head = c.q_stride.head;
  c.indices = p.indices.data();
  c.counts = p.counts.data();
  c.mass = p.mass.data();
  c.mass_mean = p.mass_mean.data();
  p.dense = r() % 2 == 0;
  return p;
}

// Stores a cache anew in 8 bits, any numbers of either sign up to 4, subnormal ones too, with a
// scale for all of K and one a KV head of V. Keys that no query sees stay NaN.
inline void store_in_8_bits(Problem& p, Random& r) {
  CacheArgs& a = p.call.cache;
  p.scales.assign(p.call.G + 1, 0.5f);
  for (int g = 0; g < p.call.G; ++g) p.scales[g] = static_cast<float>(g + 1) * 0.375f;
  a.v_scale = {p.scales.data(), 1};
  a.k_scale = {p.scales.data() + p.call.G, 0};
  for (Buffer* buffer : {&p.k, &p.v}) {
    Buffer bytes;
    const int64_t count = buffer->dtype == DType::kFloat32
                              ? static_cast<int64_t>(buffer->f32.size())
                              : static_cast<int64_t>(buffer->u16.size());
    bytes.make(DType::kFloat8, count);
    for (int64_t i = 0; i < count; ++i)
      if (!std::isnan(buffer->get(i))) bytes.u8[i] = static_cast<uint8_t>(r() % 73 | (r() & 128));
    *buffer = std::move(bytes);
  }
  a.dtype = DType::kFloat8;
  a.k = p.k.data();
  a.v = p.v.data();
}

// The logits of a row in float64, [H][visible keys].
inline std::vector<std::vector<double>> logits_of(const Problem& p, int row) {
  const cpu::Call& c = p.call;
  const Range seen = p.visible(row);
  const int b = p.cache_row(row);
  std::vector<std::vector<double>> z(c.H);
  for (int h = 0; h < c.H; ++h)
    for (int n = seen.begin; n < seen.end; ++n) {
      double dot = 0.0;
      for (int d = 0; d < c.D; ++d)
        dot += static_cast<double>(p.q.get(p.head_at(row, h) + d)) *
               p.k.get(p.slot(c.cache.k_stride, b, h / (c.H / c.G), n) + d);
      dot *= c.score.scale * scale_of(c.cache.k_scale, h / (c.H / c.G));
      z[h].push_back(c.score.softcap > 0 ? c.score.softcap * std::tanh(dot / c.score.softcap)
                                         : dot);
    }
  return z;
}

inline std::vector<double> softmax(const std::vector<double>& z, double tau) {
  double m = -std::numeric_limits<double>::infinity(), sum = 0.0;
  for (double x : z) m = std::max(m, x);
  std::vector<double> p;
  for (double x : z) sum += p.emplace_back(std::exp((x - m) / tau));
  for (double& x : p) x /= sum;
  return p;
}

}  // namespace problem
