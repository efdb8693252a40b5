// SPDX-License-Identifier: Apache-2.0
// Budget and exact top-K of one row. A sample suggests a score that somewhat more than K candidates
// reach; the sort codes of those are searched bit by bit, and the K largest are written in order.
#pragma once

#include "kernels/common/budget.h"
#include "kernels/common/sort_codes.h"
#include "kernels/common/visual_spans.h"
#include "kernels/cpu/call.h"

namespace visionpulse::cpu::VP_ISA {

VP_INLINE int count_at_least(const uint32_t* codes, int count, uint32_t code) {
  int found = 0;
  for (int i = 0; i < count; ++i) found += codes[i] >= code;
  return found;
}

// The k-th largest of the codes, bit by bit from the first in which they differ.
VP_INLINE uint32_t kth_largest(const uint32_t* codes, int count, int k) {
  uint32_t low = codes[0], high = codes[0];
  for (int i = 0; i < count; ++i) {
    low = codes[i] < low ? codes[i] : low;
    high = codes[i] > high ? codes[i] : high;
  }
  const uint32_t differ = low ^ high;
  if (differ == 0) return low;
  int bit = 31 - __builtin_clz(differ);
  uint32_t code = low & ~((2u << bit) - 1);
  for (; bit >= 0; --bit) {
    const uint32_t higher = code | 1u << bit;
    if (count_at_least(codes, count, higher) >= k) code = higher;
  }
  return code;
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

constexpr int kSample = 512;  // codes; four standard deviations of a place in it are a few percent

// A code that likely somewhat more than `k` of the row's candidates reach: one of a sample.
VP_INLINE uint32_t likely_reached(const Call& c, const Row& row, int k) {
  const int64_t count = row.n_visual;
  const int place = static_cast<int>(k * int64_t{kSample} / count);
  const int most = place + 4 + static_cast<int>(4 * __builtin_sqrtf(static_cast<float>(place)));
  if (count <= 8 * kSample || most > kSample) return 0;
  alignas(64) uint32_t sample[kSample];
  int taken = 0, before = 0;
  for_candidates(c, row, [&](int begin, int length) {
    const float* score = row.scores + (begin - row.scores_begin);
    for (; taken < kSample; ++taken) {
      // ascending; multiples of the golden ratio, so that it is in step with no row of an image
      const uint32_t step = static_cast<uint32_t>(taken) * 0x9e3779b1u >> 16;
      const int at = static_cast<int>(((int64_t{taken} << 16) + step) * count / (kSample << 16));
      if (at >= before + length) break;
      sample[taken] = sort_code(score[at - before]);
    }
    before += length;
  });
  return kth_largest(sample, kSample, most);
}

// Collects the candidates whose codes are at least `low`, ascending in position. Returns how many.
VP_INLINE int collect(const Call& c, const Row& row, uint32_t low) {
  const uint32_t bits = low & 0x80000000u ? low ^ 0x80000000u : ~low;
  float least;  // the score of `low`, NaN for 0
  __builtin_memcpy(&least, &bits, sizeof least);
  int count = 0;
  for_candidates(c, row, [&](int begin, int length) {
    const float* score = row.scores + (begin - row.scores_begin);
    uint32_t* codes = row.codes + count;
    int32_t* positions = row.positions + count;
    if (low == 0) {
      for (int i = 0; i < length; ++i) codes[i] = sort_code(score[i]);
      for (int i = 0; i < length; ++i) positions[i] = begin + i;
      count += length;
      return;
    }
    const int found = filter_scores(score, length, begin, least, codes, positions);
    for (int i = 0; i < found; ++i) {
      float one;
      __builtin_memcpy(&one, codes + i, sizeof one);
      codes[i] = sort_code(one);
    }
    count += found;
  });
  return count;
}

// `count` of the row's candidates are kept, fewer than there are.
VP_INLINE int write_largest(const Call& c, const Row& row, int count, int32_t* out) {
  const uint32_t low = likely_reached(c, row, count);
  int found = collect(c, row, low);
  uint32_t code = found < count ? 0 : kth_largest(row.codes, found, count);
  if (code < low) {  // the sample misled, or the CPU takes tiny scores for zeros
    found = collect(c, row, 0);
    code = kth_largest(row.codes, found, count);
  }
  const int ties = count - count_at_least(row.codes, found, code + 1);
  return write_kept(row.codes, row.positions, found, code, ties, out);
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
  if (count == row.n_visual) {
    for_candidates(c, row, [&](int begin, int length) {
      for (int i = 0; i < length; ++i) out[written++] = begin + i;
    });
  } else if (count > 0) {
    written = write_largest(c, row, count, out);
  }
  for (int i = written; i < c.score.k_max; ++i) out[i] = -1;
}

}  // namespace visionpulse::cpu::VP_ISA
