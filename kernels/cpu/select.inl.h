// SPDX-License-Identifier: Apache-2.0
// Budget and exact top-K of one row: radix select on ordered keys, then an ascending compaction.
#pragma once

#include "kernels/common/sort_codes.h"
#include "kernels/cpu/softmax.inl.h"

namespace visionpulse::cpu::VP_ISA {

// The K-th largest key, and how many of the keys equal to it are among the K largest.
struct Pivot {
  uint32_t key;
  int ties;
};

// Finds, from the top, the bin in which `wanted` falls; lowers it by the bins above.
VP_INLINE int find_bin(const uint32_t* bins, int count, int& wanted) {
  for (int bin = count - 1; bin > 0; --bin) {
    if (static_cast<int>(bins[bin]) >= wanted) return bin;
    wanted -= static_cast<int>(bins[bin]);
  }
  return 0;
}

VP_INLINE Pivot find_pivot(const uint32_t* keys, int count, int wanted, uint32_t* rest) {
  constexpr int kBins = 2048;
  // four histograms, so that equal neighbours do not wait for each other's store
  alignas(64) uint32_t bins[4][kBins];
  for (int i = 0; i < kBins; ++i) bins[0][i] = bins[1][i] = bins[2][i] = bins[3][i] = 0;
  int i = 0;
  for (; i + 4 <= count; i += 4)
    for (int j = 0; j < 4; ++j) ++bins[j][keys[i + j] >> 21];
  for (; i < count; ++i) ++bins[0][keys[i] >> 21];
  for (int b = 0; b < kBins; ++b) bins[0][b] += bins[1][b] + bins[2][b] + bins[3][b];
  uint32_t prefix = static_cast<uint32_t>(find_bin(bins[0], kBins, wanted));
  count = keep_digit(keys, count, 21, prefix, rest);

  constexpr int kShift[2] = {10, 0}, kBits[2] = {11, 10};
  for (int pass = 0; pass < 2; ++pass) {
    const int size = 1 << kBits[pass];
    for (int b = 0; b < size; ++b) bins[0][b] = 0;
    for (int k = 0; k < count; ++k) ++bins[0][(rest[k] >> kShift[pass]) & (size - 1u)];
    const int digit = find_bin(bins[0], size, wanted);
    prefix = prefix << kBits[pass] | static_cast<uint32_t>(digit);
    // in place: a kept key never moves past one that is still to be read
    if (pass == 0) count = keep_digit(rest, count, kShift[pass], prefix, rest);
  }
  return {prefix, wanted};
}

// Calls f(position, length) for each run of visible visual tokens, ascending.
template <class F>
VP_INLINE void for_candidates(const Call& c, const Row& row, int row_index, F f) {
  const int32_t* spans = c.visual.spans + int64_t{row_index} * c.visual.spans_per_row * 2;
  const int count = c.visual.spans_per_row;
  const Range keys = row.visible;
  for (int s = span_after(spans, count, keys.begin); s < count && spans[2 * s] < keys.end; ++s) {
    const int begin = spans[2 * s] > keys.begin ? spans[2 * s] : keys.begin;
    const int end = spans[2 * s + 1] < keys.end ? spans[2 * s + 1] : keys.end;
    f(begin, end - begin);
  }
}

VP_INLINE int wanted_count(const Call& c, int row, int n_visual) {
  const ScoreArgs& s = c.score;
  int wanted;
  if (s.wanted != nullptr) {
    wanted = count_of_wanted(s.wanted[row], n_visual);
  } else {
    const float mass = s.mass_of == MassOf::kMean ? c.mass_mean[row] : c.mass[row];
    const float ratio = clamped_ratio(s.ratio != nullptr ? s.ratio[row] : mass, s.r_min, s.r_max);
    wanted = count_of_ratio(ratio, n_visual);
  }
  return wanted < s.k_max ? wanted : s.k_max;
}

static void choose_row(const Call& c, int row_index) {
  const Row& row = c.rows[row_index];
  int32_t* out = c.indices + int64_t{row_index} * c.score.k_max;
  const int wanted = wanted_count(c, row_index, row.n_visual);
  c.counts[row_index] = wanted;
  int written = 0;
  if (wanted > 0) {
    int filled = 0;
    for_candidates(c, row, row_index, [&](int begin, int length) {
      const float* score = row.scores + (begin - row.scores_begin);
      for (int i = 0; i < length; ++i) row.keys[filled + i] = sort_code(score[i]);
      filled += length;
    });
    // every candidate: a pivot below all keys, NaN's 0 included through the ties
    Pivot pivot = {0, filled};
    if (wanted < filled) pivot = find_pivot(row.keys, filled, wanted, row.digits);
    int read = 0;
    for_candidates(c, row, row_index, [&](int begin, int length) {
      written += emit_kept(row.keys + read, length, begin, pivot.key, pivot.ties, out + written);
      read += length;
    });
  }
  for (int i = written; i < c.score.k_max; ++i) out[i] = -1;
}

// Words of a buffer, xored: nothing but reading.
static uint64_t read_bytes(const void* bytes, int64_t count) {
  const float* p = static_cast<const float*>(bytes);
  constexpr int kStep = 8 * kWidth;
  Vec sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = vzero();
  for (int64_t at = 0; at + kStep <= count / 4; at += kStep)
    for (int i = 0; i < 8; ++i) sum[i] = vmax_number(vload(p + at + i * kWidth), sum[i]);
  alignas(64) float lanes[kWidth];
  uint64_t all = 0;
  for (int i = 0; i < 8; ++i) {
    vstore(lanes, sum[i]);
    for (int j = 0; j < kWidth; ++j) all ^= float_bits(lanes[j]);
  }
  return all;
}

}  // namespace visionpulse::cpu::VP_ISA
