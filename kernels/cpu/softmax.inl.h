// SPDX-License-Identifier: Apache-2.0
// The online softmax of one block, for a tile of heads, with the sums at temperature tau beside it.
#pragma once

#include "kernels/cpu/block.inl.h"

namespace visionpulse::cpu::VP_ISA {

enum class Content { kText, kVisual, kMixed };

// The visual tokens among the keys of a block.
struct BlockVisual {
  Content content;
  alignas(64) uint32_t mask[kBlock * 4];  // [tiles, kLanes] all ones where the lane's key is visual
};

// Running statistics of one head tile; each lane sums its own keys, and all lanes of a head share m.
struct TileState {
  alignas(64) float m[kLanes], l[kLanes], text[kLanes], visual[kLanes];

  VP_INLINE void reset(TileState& s) {
    for (int i = 0; i < kLanes; ++i) {
      s.m[i] = minus_infinity();
      s.l[i] = s.text[i] = s.visual[i] = 0.0f;
    }
  }
};

struct SoftmaxArgs {
  float inv_tau;
  bool at_tau;  // sum at 1 / tau too
};

// Lanes of one head made equal to their largest.
template <int HT>
VP_INLINE void spread_max(float* lanes) {
  for (int step = kLanes / 2; step >= HT; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i + step] > lanes[i] ? lanes[i + step] : lanes[i];
  for (int i = HT; i < kLanes; ++i) lanes[i] = lanes[i % HT];
}

// Sums exp2((x - m) / tau) of the block's keys into text and visual keys.
template <int HT>
VP_INLINE void add_mass(const float* x, int stride, int tiles, const BlockVisual& which, float inv_tau,
                        TileState& s, const float* m_old) {
  for (int j = 0; j < kParts; ++j) {
    float* const lanes[2] = {s.text + j * kWidth, s.visual + j * kWidth};
    alignas(64) float exponent[kWidth], subtract[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      exponent[i] = rescale_exponent(m_old[j * kWidth + i], s.m[j * kWidth + i]) * inv_tau;
      subtract[i] = safe_max(s.m[j * kWidth + i]);
    }
    const Vec scale = exp2_full(vload(exponent)), m = vload(subtract), by = vset(inv_tau);
    Vec sum = vzero(), visual = vzero();
    for (int i = 0; i < tiles; ++i) {
      const Vec e = exp2_mass(vmul(vsub(vload(x + i * stride + j * kWidth), m), by));
      if (which.content == Content::kMixed) {
        const uint32_t* mask = which.mask + i * kLanes + j * kWidth;
        const Vec kept = vand_bits(e, mask);
        visual = vadd(visual, kept);
        alignas(64) uint32_t inverse[kWidth];
        for (int k = 0; k < kWidth; ++k) inverse[k] = ~mask[k];
        sum = vadd(sum, vand_bits(e, inverse));
      } else {
        sum = vadd(sum, e);
      }
    }
    if (which.content == Content::kVisual) {
      visual = sum;
      sum = vzero();
    }
    vstore(lanes[0], vfma(vload(lanes[0]), scale, sum));
    vstore(lanes[1], vfma(vload(lanes[1]), scale, visual));
  }
}

// Turns logits x [tiles, kLanes] into weights in place; alpha [HT] is what earlier sums shrink by.
template <int HT>
VP_INLINE void softmax_tile(float* x, int stride, int tiles, const BlockVisual* which,
                            const SoftmaxArgs& a, TileState& s, float* alpha) {
  alignas(64) float m_old[kLanes], exponent[kLanes], subtract[kLanes];
  for (int i = 0; i < kLanes; ++i) m_old[i] = s.m[i];
  for (int j = 0; j < kParts; ++j) {
    Vec m = vload(s.m + j * kWidth);
    for (int i = 0; i < tiles; ++i) m = vmax_number(vload(x + i * stride + j * kWidth), m);
    vstore(s.m + j * kWidth, m);
  }
  spread_max<HT>(s.m);
  for (int i = 0; i < kLanes; ++i) {
    exponent[i] = rescale_exponent(m_old[i], s.m[i]);
    subtract[i] = safe_max(s.m[i]);
  }
  if (a.at_tau) add_mass<HT>(x, stride, tiles, *which, a.inv_tau, s, m_old);
  for (int j = 0; j < kParts; ++j) {
    const Vec scale = exp2_full(vload(exponent + j * kWidth)), m = vload(subtract + j * kWidth);
    vstore(exponent + j * kWidth, scale);
    Vec sum = vzero();
    for (int i = 0; i < tiles; ++i) {
      float* at = x + i * stride + j * kWidth;
      const Vec e = exp2_full(vsub(vload(at), m));
      vstore(at, e);
      sum = vadd(sum, e);
    }
    vstore(s.l + j * kWidth, vfma(vload(s.l + j * kWidth), scale, sum));
  }
  for (int h = 0; h < HT; ++h) alpha[h] = exponent[h];
}

// Which lanes of the keys [from, from + keys) are visual; `span` is the first run that can matter and
// moves on with the blocks.
template <int HT>
VP_INLINE void find_visual(const VisualArgs& v, int row, int from, int keys, int& span,
                           BlockVisual& out) {
  const int32_t* spans = v.spans + int64_t{row} * v.spans_per_row * 2;
  while (span < v.spans_per_row && spans[2 * span + 1] <= from) ++span;
  const int end = from + keys;
  out.content = Content::kText;
  if (span == v.spans_per_row || spans[2 * span] >= end) return;
  out.content = Content::kVisual;
  if (spans[2 * span] <= from && spans[2 * span + 1] >= end) return;
  out.content = Content::kMixed;
  for (int i = 0; i < kBlock * HT; ++i) out.mask[i] = 0;
  for (int s = span; s < v.spans_per_row && spans[2 * s] < end; ++s) {
    const int begin = spans[2 * s] > from ? spans[2 * s] - from : 0;
    const int stop = (spans[2 * s + 1] < end ? spans[2 * s + 1] : end) - from;
    for (int i = begin * HT; i < stop * HT; ++i) out.mask[i] = 0xffffffffu;
  }
}

}  // namespace visionpulse::cpu::VP_ISA
