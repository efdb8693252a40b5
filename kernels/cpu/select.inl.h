// SPDX-License-Identifier: Apache-2.0
// Budget and exact top-K of one row: sort codes are narrowed to a range that a sample suggests, and
// its codes are searched bit by bit; then an ascending compaction.
#pragma once

#include "kernels/common/budget.h"
#include "kernels/common/sort_codes.h"
#include "kernels/common/visual_spans.h"
#include "kernels/cpu/call.h"

namespace visionpulse::cpu::VP_ISA {

// The K-th largest sort code, and how many of the codes equal to it are among the K largest.
struct Pivot {
  uint32_t code;
  int ties;
};

VP_INLINE int count_at_least(const uint32_t* codes, int count, uint32_t code) {
  int found = 0;
  for (int i = 0; i < count; ++i) found += codes[i] >= code;
  return found;
}

// The k-th largest of codes in `range`, bit by bit from the first in which its ends differ.
VP_INLINE uint32_t kth_largest(const uint32_t* codes, int count, int k, CodeRange range) {
  const uint32_t differ = range.low ^ range.high;
  int bit = differ == 0 ? -1 : 31 - __builtin_clz(differ);
  uint32_t code = differ == 0 ? range.low : range.low & ~((2u << bit) - 1);
  for (; bit >= 0; --bit) {
    const uint32_t higher = code | 1u << bit;
    if (count_at_least(codes, count, higher) >= k) code = higher;
  }
  return code;
}

constexpr int kSample = 1024;  // codes; four standard deviations of a place in it are a few percent

// A range that likely holds the k-th largest: of the codes around its place in a sample.
VP_INLINE CodeRange likely_range(const uint32_t* codes, int count, int k) {
  alignas(64) uint32_t sample[kSample];
  for (int i = 0; i < kSample; ++i) {
    // multiples of the golden ratio: even, and in step with no row of an image
    const uint32_t place = static_cast<uint32_t>(i) * 0x9e3779b1u;
    sample[i] = codes[uint64_t{place} * static_cast<uint32_t>(count) >> 32];
  }
  const int place = static_cast<int>(int64_t{k} * kSample / count);
  const int margin = 4 + static_cast<int>(4 * __builtin_sqrtf(static_cast<float>(place)));
  CodeRange range = kAllCodes;
  if (place - margin > 0) range.high = kth_largest(sample, kSample, place - margin, kAllCodes);
  if (place + margin <= kSample) range.low = kth_largest(sample, kSample, place + margin, range);
  return range;
}

// `in_range` has space for count + kLanes.
VP_INLINE Pivot find_pivot(const uint32_t* codes, int count, int k, uint32_t* in_range) {
  CodeRange range = kAllCodes;
  if (count > 4 * kSample) {
    range = likely_range(codes, count, k);
    InRange found = filter_range(codes, count, range, in_range);
    const bool is_above = k <= found.above;
    if (is_above || k > found.above + found.count) {
      range = is_above ? CodeRange{range.high + 1, kAllCodes.high}
                       : CodeRange{kAllCodes.low, range.low - 1};
      found = filter_range(codes, count, range, in_range);
    }
    codes = in_range;
    count = found.count;
    k -= found.above;
  }
  const uint32_t code = kth_largest(codes, count, k, range);
  return {code, k - count_at_least(codes, count, code + 1)};
}

// Calls f(position, length) for each run of visible visual tokens, in ascending order.
template <class F>
VP_INLINE void for_candidates(const Call& c, const Row& row, F f) {
  const int32_t* spans = c.visual.spans + int64_t{row.cache_row} * c.visual.spans_per_row * 2;
  const int count = c.visual.spans_per_row;
  const Range visible = row.visible;
  for (int s = span_after(spans, count, visible.begin); s < count && spans[2 * s] < visible.end;
       ++s) {
    const int begin = spans[2 * s] > visible.begin ? spans[2 * s] : visible.begin;
    const int end = spans[2 * s + 1] < visible.end ? spans[2 * s + 1] : visible.end;
    f(begin, end - begin);
  }
}

VP_INLINE int count_of_row(const Call& c, int row, int n_visual) {
  const ScoreArgs& s = c.score;
  int count;
  if (s.wanted != nullptr) {
    count = count_of_wanted(s.wanted[row], n_visual);
  } else {
    const float mass = s.mass_of == MassOf::kMean ? c.mass_mean[row] : c.mass[row];
    const float ratio = clamped_ratio(s.ratio != nullptr ? s.ratio[row] : mass, s.r_min, s.r_max);
    count = count_of_ratio(ratio, n_visual);
  }
  return count < s.k_max ? count : s.k_max;
}

static void select_row(const Call& c, int row_index) {
  const Row& row = c.rows[row_index];
  int32_t* out = c.indices + int64_t{row_index} * c.score.k_max;
  const int count = count_of_row(c, row_index, row.n_visual);
  c.counts[row_index] = count;
  int written = 0;
  if (count > 0) {
    int filled = 0;
    for_candidates(c, row, [&](int begin, int length) {
      const float* score = row.scores + (begin - row.scores_begin);
      for (int i = 0; i < length; ++i) row.sort_codes[filled + i] = sort_code(score[i]);
      filled += length;
    });
    // to keep all: the lowest code, which is that of NaN, and as many ties as there are codes
    Pivot pivot = {0, filled};
    if (count < filled) pivot = find_pivot(row.sort_codes, filled, count, row.range_codes);
    int read = 0;
    for_candidates(c, row, [&](int begin, int length) {
      written +=
          write_kept(row.sort_codes + read, length, begin, pivot.code, pivot.ties, out + written);
      read += length;
    });
  }
  for (int i = written; i < c.score.k_max; ++i) out[i] = -1;
}

}  // namespace visionpulse::cpu::VP_ISA
