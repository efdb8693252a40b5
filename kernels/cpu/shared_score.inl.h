// SPDX-License-Identifier: Apache-2.0
// From the stored logits of several queries of a row to the scores of each.
#pragma once

#include "kernels/cpu/score.inl.h"

namespace visionpulse::cpu::VP_ISA {

// For one key, what each head adds to its query's score, summed over KV heads: sum [padded].
template <ScoreKind KIND>
VP_INLINE void add_heads(const Call& c, const SharedPass& pass, int cache_row, int key,
                         float* sum) {
  const Vec inv_tau = vset(1.0f / c.score.tau);
  for (int r = 0; r < pass.padded; r += kWidth) {
    Vec all = vzero();
    for (int g = 0; g < c.G; ++g) {
      const Vec z =
          vload(pass.stored_logits + (int64_t{g} * pass.padded_keys + key) * pass.padded + r);
      if (KIND == ScoreKind::kLogit) {
        all = vadd(all, z);
        continue;
      }
      const int64_t at = (int64_t{cache_row} * c.G + g) * c.part_heads + r;
      Vec e = vsub(z, vload(c.head_max + at));
      if (KIND == ScoreKind::kProbTau) e = vmul(e, inv_tau);
      all = vfma(exp2_full(e), vload(c.head_weight + at), all);
    }
    vstore(sum + r, all);
  }
}

template <ScoreKind KIND>
static void score_keys(const Call& c, int cache_row, int chunk) {
  const SharedPass& pass = c.passes[cache_row];
  const int group = c.H / c.G, queries = pass.count / group;
  const Row* const query = c.rows + int64_t{cache_row} * c.queries.count + pass.first;
  const int begin = pass.seen.begin + chunk * kScoreChunk;
  const int end = begin + kScoreChunk < pass.seen.end ? begin + kScoreChunk : pass.seen.end;
  const int32_t* spans = c.visual.spans + int64_t{cache_row} * c.visual.spans_per_row * 2;
  int span = span_after(spans, c.visual.spans_per_row, begin);
  const float mean = KIND == ScoreKind::kLogit ? kLn2 / static_cast<float>(c.H) : 1.0f;
  alignas(64) float sum[kMaxQueries * kMaxGroup];
  for (int n = begin; n < end; ++n) {
    while (span < c.visual.spans_per_row && spans[2 * span + 1] <= n) ++span;
    const bool visual = span < c.visual.spans_per_row && spans[2 * span] <= n;
    if (!visual && !c.fill_scores) continue;
    if (visual) add_heads<KIND>(c, pass, cache_row, n - pass.seen.begin, sum);
    for (int i = 0; i < queries; ++i) {
      if (n < query[i].visible.begin || n >= query[i].visible.end) continue;
      float score = minus_infinity();
      if (visual) {
        score = 0.0f;
        for (int h = 0; h < group; ++h) score += sum[i * group + h];
        score *= mean;
      }
      query[i].scores[n - query[i].scores_begin] = score;
    }
  }
}

static void score_chunk_of_queries(const Call& c, int cache_row, int chunk) {
  switch (c.score.kind) {
    case ScoreKind::kProb:
      return score_keys<ScoreKind::kProb>(c, cache_row, chunk);
    case ScoreKind::kLogit:
      return score_keys<ScoreKind::kLogit>(c, cache_row, chunk);
    case ScoreKind::kProbTau:
      return score_keys<ScoreKind::kProbTau>(c, cache_row, chunk);
  }
}

}  // namespace visionpulse::cpu::VP_ISA
