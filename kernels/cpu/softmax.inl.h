// SPDX-License-Identifier: Apache-2.0
// The online softmax of one block, for a tile of heads, with the sums at temperature tau beside it.
#pragma once

#include "kernels/cpu/block.inl.h"

namespace visionpulse::cpu::VP_ISA {

enum class Content { kText, kVisual, kMixed };

// The visual tokens among the keys of a block.
struct BlockVisual {
  Content content;
  // [tiles, kLanes] all ones where the lane's key is of the kind; only of a mixed block
  alignas(64) uint32_t visual[kBlock * 4], text[kBlock * 4];
};

// Running statistics of one head tile; each lane sums its own keys, and all lanes of a head share
// m.
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

// A tile's worth of lanes.
struct Lanes {
  Vec part[kParts];

  VP_INLINE Lanes load(const float* p) {
    Lanes x;
    for (int j = 0; j < kParts; ++j) x.part[j] = vload(p + j * kWidth);
    return x;
  }
  VP_INLINE void store(float* p, const Lanes& x) {
    for (int j = 0; j < kParts; ++j) vstore(p + j * kWidth, x.part[j]);
  }
};

// Lanes of one head made equal to their largest.
template <int HT>
VP_INLINE Lanes spread_max(const Lanes& x) {
#if defined(VP_HAS_SPREAD_MAX)
  return {{vspread_max<HT>(x.part[0])}};
#else
  alignas(64) float lanes[kLanes];
  Lanes::store(lanes, x);
  for (int step = kLanes / 2; step >= HT; step /= 2)
    for (int i = 0; i < step; ++i)
      lanes[i] = lanes[i + step] > lanes[i] ? lanes[i + step] : lanes[i];
  for (int i = HT; i < kLanes; ++i) lanes[i] = lanes[i % HT];
  return Lanes::load(lanes);
#endif
}

// safe_max of softmax.h, a register at a time.
VP_INLINE Vec vsafe_max(Vec m) { return vless(m, vset(-3.4028235e38f), vzero(), m); }

// Sums exp2((x - m) / tau) of the block's keys into text and visual keys; `shrink` is what m has
// grown by, as a negative exponent.
VP_INLINE void add_mass(const float* x, int stride, int tiles, const BlockVisual& which,
                        float inv_tau, TileState& s, const Lanes& m, const Lanes& shrink) {
  const Vec by = vset(inv_tau);
  for (int j = 0; j < kParts; ++j) {
    Vec text = vzero(), visual = vzero();
    for (int i = 0; i < tiles; ++i) {
      const Vec e = exp2_mass(vmul(vsub(vload(x + i * stride + j * kWidth), m.part[j]), by));
      if (which.content == Content::kMixed) {
        const int lane = i * kLanes + j * kWidth;
        visual = vadd(visual, vand_bits(e, which.visual + lane));
        text = vadd(text, vand_bits(e, which.text + lane));
      } else {
        text = vadd(text, e);
      }
    }
    if (which.content == Content::kVisual) {
      visual = text;
      text = vzero();
    }
    const Vec scale = exp2_full(vmul(shrink.part[j], by));
    float* const lane[2] = {s.text + j * kWidth, s.visual + j * kWidth};
    vstore(lane[0], vfma(vload(lane[0]), scale, text));
    vstore(lane[1], vfma(vload(lane[1]), scale, visual));
  }
}

// Turns logits x [tiles, kLanes] into weights in place; alpha [kLanes], one per head and repeated,
// is what earlier sums shrink by.
template <int HT>
VP_INLINE void softmax_tile(float* x, int stride, int tiles, const BlockVisual* which,
                            const SoftmaxArgs& a, TileState& s, float* alpha) {
  const Lanes old = Lanes::load(s.m);
  Lanes m = old, shrink;
  for (int i = 0; i < tiles; ++i)
    for (int j = 0; j < kParts; ++j)
      m.part[j] = vmax_number(vload(x + i * stride + j * kWidth), m.part[j]);
  m = spread_max<HT>(m);
  Lanes::store(s.m, m);
  for (int j = 0; j < kParts; ++j) {
    m.part[j] = vsafe_max(m.part[j]);
    shrink.part[j] = vsub(old.part[j], m.part[j]);
  }
  if (a.at_tau) add_mass(x, stride, tiles, *which, a.inv_tau, s, m, shrink);
  for (int j = 0; j < kParts; ++j) {
    const Vec scale = exp2_full(shrink.part[j]);
    vstore(alpha + j * kWidth, scale);
    Vec sum = vzero();
    for (int i = 0; i < tiles; ++i) {
      float* at = x + i * stride + j * kWidth;
      const Vec e = exp2_full(vsub(vload(at), m.part[j]));
      vstore(at, e);
      sum = vadd(sum, e);
    }
    vstore(s.l + j * kWidth, vfma(vload(s.l + j * kWidth), scale, sum));
  }
}

// Which lanes of the keys [from, from + keys) are visual; `span` is the first run that can matter
// and moves on with the blocks.
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
  for (int i = 0; i < kBlock * HT; ++i) out.visual[i] = 0;
  for (int s = span; s < v.spans_per_row && spans[2 * s] < end; ++s) {
    const int begin = spans[2 * s] > from ? spans[2 * s] - from : 0;
    const int stop = (spans[2 * s + 1] < end ? spans[2 * s + 1] : end) - from;
    for (int i = begin * HT; i < stop * HT; ++i) out.visual[i] = 0xffffffffu;
  }
  for (int i = 0; i < kBlock * HT; ++i) out.text[i] = ~out.visual[i];
}

}  // namespace visionpulse::cpu::VP_ISA
