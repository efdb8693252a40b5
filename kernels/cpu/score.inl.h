// SPDX-License-Identifier: Apache-2.0
// From stored logits to scores: first the statistics of the whole row, then one pass over the
// logits.
#pragma once

#include "kernels/common/budget.h"
#include "kernels/common/visual_spans.h"
#include "kernels/cpu/parts.inl.h"

namespace visionpulse::cpu::VP_ISA {

// A head's softmax over the whole row: the sum at 1, and the sums at 1 / tau over text and over
// visual keys.
struct HeadSums {
  float m, l, text, visual;
};

// Takes the parts in order.
VP_INLINE HeadSums sum_of_parts(const Call& c, const RowParts& parts, int kv_head, int i) {
  const int64_t first = part_index(parts.cut, kv_head, 0);
  const int h = parts.first_head + i;
  const float inv_tau = 1.0f / c.score.tau;
  HeadSums sums = {minus_infinity(), 0.0f, 0.0f, 0.0f};
  for (int s = 0; s < parts.count; ++s) {
    const float m = part_at(c, first + s).m[h];
    sums.m = m > sums.m ? m : sums.m;
  }
  for (int s = 0; s < parts.count; s += kLanes) {
    const int count = parts.count - s < kLanes ? parts.count - s : kLanes;
    alignas(64) float w[kLanes] = {}, w_tau[kLanes];
    for (int k = 0; k < count; ++k) w[k] = rescale_exponent(part_at(c, first + s + k).m[h], sums.m);
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      const Vec exponent = vload(w + lane);
      vstore(w + lane, exp2_full(exponent));
      vstore(w_tau + lane, exp2_full(vmul(exponent, vset(inv_tau))));
    }
    for (int k = 0; k < count; ++k) {
      const Part part = part_at(c, first + s + k);
      sums.l += w[k] * part.l[h];
      sums.text += w_tau[k] * part.text[h];
      sums.visual += w_tau[k] * part.visual[h];
    }
  }
  return sums;
}

static void row_statistics(const Call& c, int row) {
  const RowParts parts = parts_of_row(c, row);
  const int group = c.H / c.G, tiles = head_tiles(group), tile = tile_heads(group);
  const int heads = c.shared ? group : padded_heads(group);
  float mass[kMaxGroup], sum = 0.0f, largest = 0.0f;
  for (int g = 0; g < c.G; ++g) {
    const int64_t at =
        c.shared ? (int64_t{c.rows[row].cache_row} * c.G + g) * c.part_heads + parts.first_head
                 : (int64_t{row} * c.G + g) * tiles * kLanes;
    for (int h = 0; h < heads; ++h) {
      const HeadSums sums = sum_of_parts(c, parts, g, h);
      const float all = sums.text + sums.visual;
      if (h < group) mass[h] = c.rows[row].n_visual == 0 || all == 0.0f ? 0.0f : sums.visual / all;
      const float denominator = c.score.kind == ScoreKind::kProbTau ? all : sums.l;
      float weight = 0.0f;
      if (h < group && denominator != 0.0f) weight = 1.0f / (denominator * static_cast<float>(c.H));
      if (c.shared && parts.count > 0) {
        c.head_max[at + h] = safe_max(sums.m);
        c.head_weight[at + h] = weight;
      }
      for (int i = h % tile; !c.shared && i < kLanes; i += tile) {
        c.head_max[at + h / tile * kLanes + i] = safe_max(sums.m);
        c.head_weight[at + h / tile * kLanes + i] = weight;
      }
    }
    const Masses masses = masses_of_heads(mass, group);
    // a NaN must reach both numbers: !(a <= b) takes it, and then nothing replaces it
    if (largest == largest && !(masses.max <= largest)) largest = masses.max;
    sum += masses.mean;
  }
  c.mass[row] = largest;
  c.mass_mean[row] = sum / static_cast<float>(c.G);
}

// Key tiles whose scores are summed in registers, and how many floats ahead logits are asked for.
constexpr int kScoreTiles = kTileVecs == 1 ? 8 : 4, kLogitsAhead = kStreams ? 128 : 256;

// Sums the scores over KV heads and head tiles, for up to kScoreTiles key tiles: acc [key tiles,
// kLanes].
template <int HT, ScoreKind KIND>
VP_INLINE void score_tiles(const Call& c, const Row& row, int row_index, int first_tile, int count,
                           float* acc) {
  constexpr int kTileKeys = kLanes / HT;
  const int tiles = head_tiles(c.H / c.G);
  const Vec inv_tau = vset(1.0f / c.score.tau);
  Vec sum[kScoreTiles * kTileVecs];
  for (int i = 0; i < kScoreTiles * kTileVecs; ++i) sum[i] = vzero();
  for (int g = 0; g < c.G; ++g) {
    const float* x = row.stored_logits +
                     ((int64_t{g} * (row.padded_keys / kTileKeys) + first_tile) * tiles) * kLanes;
    const int64_t at = (int64_t{row_index} * c.G + g) * tiles * kLanes;
    for (int t = 0; t < tiles; ++t) {
      for (int i = 0; i < count * kTileVecs; ++i) {
        const int lane = i % kTileVecs * kWidth;
        const float* at_tile = x + (i / kTileVecs * tiles + t) * kLanes + lane;
        __builtin_prefetch(at_tile + kLogitsAhead, 0, 3);  // each KV head is a stream of its own
        const Vec z = vload(at_tile);
        if (KIND == ScoreKind::kLogit) {
          sum[i] = vadd(sum[i], z);
          continue;
        }
        Vec e = vsub(z, vload(c.head_max + at + t * kLanes + lane));
        if (KIND == ScoreKind::kProbTau) e = vmul(e, inv_tau);
        sum[i] = vfma(exp2_full(e), vload(c.head_weight + at + t * kLanes + lane), sum[i]);
      }
    }
  }
  for (int i = 0; i < count * kTileVecs; ++i) vstore(acc + i * kWidth, sum[i]);
}

// Scores of a block: the lanes of each key added up.
template <int HT, ScoreKind KIND>
VP_INLINE void score_block(const Call& c, const Row& row, int row_index, int first, int keys,
                           float* score /* [kBlock] */) {
  constexpr int kTileKeys = kLanes / HT;
  alignas(64) float acc[kBlock * HT];
  const int tiles = (keys + kTileKeys - 1) / kTileKeys;
  for (int i = 0; i < tiles; i += kScoreTiles) {
    // a constant count unrolls; only the last block of a row has another
    if (tiles - i >= kScoreTiles) {
      score_tiles<HT, KIND>(c, row, row_index, first / kTileKeys + i, kScoreTiles,
                            acc + i * kLanes);
    } else {
      score_tiles<HT, KIND>(c, row, row_index, first / kTileKeys + i, tiles - i, acc + i * kLanes);
    }
  }
  const float mean = KIND == ScoreKind::kLogit ? kLn2 / static_cast<float>(c.H) : 1.0f;
  for (int i = 0; i < keys; ++i) {
    float s = acc[i * HT];
    if (HT == 2) s += acc[i * HT + HT / 2];
    if (HT == 4) s = (s + acc[i * HT + HT / 4]) + (acc[i * HT + HT / 2] + acc[i * HT + HT - 1]);
    score[i] = s * mean;
  }
}

template <int HT, ScoreKind KIND>
static void score_chunk(const Call& c, int row_index, int chunk) {
  const Row& row = c.rows[row_index];
  const int32_t* spans = c.visual.spans + int64_t{row_index} * c.visual.spans_per_row * 2;
  const int count = c.visual.spans_per_row, visible = row.visible.end - row.visible.begin;
  const int begin = chunk * kScoreChunk;
  const int end = begin + kScoreChunk < visible ? begin + kScoreChunk : visible;
  int span = span_after(spans, count, row.visible.begin + begin);
  for (int first = begin; first < end; first += kBlock) {
    const int keys = end - first < kBlock ? end - first : kBlock;
    const int from = row.visible.begin + first, to = from + keys;
    float* out = row.scores + (from - row.scores_begin);
    if (c.fill_scores)
      for (int i = 0; i < keys; ++i) out[i] = minus_infinity();
    while (span < count && spans[2 * span + 1] <= from) ++span;
    if (span == count || spans[2 * span] >= to) continue;
    alignas(64) float score[kBlock];
    score_block<HT, KIND>(c, row, row_index, first, keys, score);
    for (int s = span; s < count && spans[2 * s] < to; ++s) {
      const int low = spans[2 * s] > from ? spans[2 * s] - from : 0;
      const int high = (spans[2 * s + 1] < to ? spans[2 * s + 1] : to) - from;
      for (int i = low; i < high; ++i) out[i] = score[i];
    }
  }
}

template <int HT>
static void score_kind(const Call& c, int row, int chunk) {
  switch (c.score.kind) {
    case ScoreKind::kProb:
      return score_chunk<HT, ScoreKind::kProb>(c, row, chunk);
    case ScoreKind::kLogit:
      return score_chunk<HT, ScoreKind::kLogit>(c, row, chunk);
    case ScoreKind::kProbTau:
      return score_chunk<HT, ScoreKind::kProbTau>(c, row, chunk);
  }
}

}  // namespace visionpulse::cpu::VP_ISA
