// SPDX-License-Identifier: Apache-2.0
// Budget and exact top-K of one row: a radix select on sort codes, then an ascending compaction.
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

// The bin of the k-th largest code; lowers k by the codes in the bins above.
VP_INLINE int find_bin(const uint32_t* bins, int count, int& k) {
  for (int bin = count - 1; bin > 0; --bin) {
    if (static_cast<int>(bins[bin]) >= k) return bin;
    k -= static_cast<int>(bins[bin]);
  }
  return 0;
}

// Three histograms, of 11, 11 and 10 bits. Each counts only the codes in the bin that the one
// before found, which `bin_codes` collects.
VP_INLINE Pivot find_pivot(const uint32_t* codes, int count, int k, uint32_t* bin_codes) {
  constexpr int kBins = 2048;
  // four histograms, because equal neighbours would wait for each other's store
  alignas(64) uint32_t bins[4][kBins];
  for (int i = 0; i < kBins; ++i) bins[0][i] = bins[1][i] = bins[2][i] = bins[3][i] = 0;
  int i = 0;
  for (; i + 4 <= count; i += 4)
    for (int j = 0; j < 4; ++j) ++bins[j][codes[i + j] >> 21];
  for (; i < count; ++i) ++bins[0][codes[i] >> 21];
  for (int b = 0; b < kBins; ++b) bins[0][b] += bins[1][b] + bins[2][b] + bins[3][b];
  uint32_t prefix = static_cast<uint32_t>(find_bin(bins[0], kBins, k));
  count = filter_prefix(codes, count, 21, prefix, bin_codes);

  constexpr int kShift[2] = {10, 0}, kBits[2] = {11, 10};
  for (int pass = 0; pass < 2; ++pass) {
    const int size = 1 << kBits[pass];
    for (int b = 0; b < size; ++b) bins[0][b] = 0;
    for (int j = 0; j < count; ++j) ++bins[0][(bin_codes[j] >> kShift[pass]) & (size - 1u)];
    const int bin = find_bin(bins[0], size, k);
    prefix = prefix << kBits[pass] | static_cast<uint32_t>(bin);
    // in place: no code is written over one that is still to be read
    if (pass == 0) count = filter_prefix(bin_codes, count, kShift[pass], prefix, bin_codes);
  }
  return {prefix, k};
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
    if (count < filled) pivot = find_pivot(row.sort_codes, filled, count, row.bin_codes);
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
