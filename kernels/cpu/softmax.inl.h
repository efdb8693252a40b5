// SPDX-License-Identifier: Apache-2.0
// The online softmax of a block, one head tile at a time, with the sums at temperature tau beside
// it.
#pragma once

#include "kernels/cpu/call.h"
#include "kernels/cpu/math.inl.h"
#include "kernels/cpu/prefetch.inl.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kTileVecs = kLanes / kWidth;  // registers of a tile

enum class Content { kText, kVisual, kMixed };

// The visual tokens among the keys of a block.
struct BlockVisual {
  Content content;
  // [key tiles, kLanes], only filled for a mixed block: all ones where the lane's key is visual, or
  // text
  alignas(64) uint32_t visual_lanes[kByteBlock * 4], text_lanes[kByteBlock * 4];
};

// Running statistics of one head tile. Each lane sums its own keys; all lanes of a head share m, a
// logit that none of the keys so far exceeds by more than slack_of.
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
  bool at_tau;  // also sum at 1 / tau
};

// One tile in registers.
struct Lanes {
  Vec vec[kTileVecs];

  VP_INLINE Lanes load(const float* p) {
    Lanes x;
    for (int j = 0; j < kTileVecs; ++j) x.vec[j] = vload(p + j * kWidth);
    return x;
  }
  VP_INLINE void store(float* p, const Lanes& x) {
    for (int j = 0; j < kTileVecs; ++j) vstore(p + j * kWidth, x.vec[j]);
  }
};

// Gives all lanes of a head their maximum.
template <int HT>
VP_INLINE Lanes spread_max(const Lanes& x) {
#if defined(VP_HAS_SPREAD_MAX)
  return {{vspread_max<HT>(x.vec[0])}};
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

// Adds exp2((x - m) / tau) of the block to the sums over text and over visual keys. `exponent` <= 0
// rescales the sums so far to the new m; SAME: they are of this m.
template <bool SAME, class F>
VP_INLINE void add_mass(const float* x, int stride, int tiles, const BlockVisual& block,
                        float inv_tau, TileState& s, const Lanes& m, const Lanes& exponent,
                        const F& beside) {
  const Vec inverse = vset(inv_tau);
  for (int j = 0; j < kTileVecs; ++j) {
    Vec text = vzero(), visual = vzero();
    for (int i = 0; i < tiles; ++i) {
      beside(Phase::kMass);
      const Vec e = exp2_mass(vmul(vsub(vload(x + i * stride + j * kWidth), m.vec[j]), inverse));
      if (block.content == Content::kMixed) {
        const int lane = i * kLanes + j * kWidth;
        visual = vadd(visual, vand_bits(e, block.visual_lanes + lane));
        text = vadd(text, vand_bits(e, block.text_lanes + lane));
      } else {
        text = vadd(text, e);
      }
    }
    if (block.content == Content::kVisual) {
      visual = text;
      text = vzero();
    }
    const Vec scale = SAME ? vset(1.0f) : exp2_full(vmul(exponent.vec[j], inverse));
    float* const lane[2] = {s.text + j * kWidth, s.visual + j * kWidth};
    vstore(lane[0], vfma(vload(lane[0]), scale, text));
    vstore(lane[1], vfma(vload(lane[1]), scale, visual));
  }
}

// How far, in powers of two, a logit may lie above the reference m before m follows it. Until then
// no exponential waits for the largest logit of its block. Sums stay finite: 2^8 a key, and 2^80 at
// a tau of 0.1; below that m is the maximum.
VP_INLINE float slack_of(const SoftmaxArgs& a) {
  return a.at_tau && a.inv_tau > 10.001f ? 0.0f : 8.0f;
}

// The larger of x [key tiles, kLanes] and m, lane by lane.
VP_INLINE Lanes largest_of(const float* x, int stride, int tiles, Lanes m) {
  for (int i = 0; i < tiles; ++i)
    for (int j = 0; j < kTileVecs; ++j)
      m.vec[j] = vmax_number(vload(x + i * stride + j * kWidth), m.vec[j]);
  return m;
}

// Whether no head's logits lie further above its reference than `slack`.
VP_INLINE bool lies_below(const Lanes& most, const Lanes& m, float slack) {
  for (int j = 0; j < kTileVecs; ++j)
    if (vany_greater(most.vec[j], vadd(m.vec[j], vset(slack)))) return false;
  return true;
}

// Adds exp2(x - m) to the sums, and leaves it in the place of x. SAME: the sums so far are of this
// m.
template <bool SAME, class F>
VP_INLINE void add_weights(float* x, int stride, int tiles, const BlockVisual* block,
                           const SoftmaxArgs& a, TileState& s, const Lanes& m,
                           const Lanes& exponent, float* rescale, const F& beside) {
  if (a.at_tau) add_mass<SAME>(x, stride, tiles, *block, a.inv_tau, s, m, exponent, beside);
  for (int j = 0; j < kTileVecs; ++j) {
    const Vec scale = SAME ? vset(1.0f) : exp2_full(exponent.vec[j]);
    vstore(rescale + j * kWidth, scale);
    Vec sum = vzero();
    for (int i = 0; i < tiles; ++i) {
      float* at = x + i * stride + j * kWidth;
      beside(Phase::kSoftmax);
      const Vec e = exp2_full(vsub(vload(at), m.vec[j]));
      vstore(at, e);
      sum = vadd(sum, e);
    }
    vstore(s.l + j * kWidth, vfma(vload(s.l + j * kWidth), scale, sum));
  }
}

// Turns the logits x [key tiles, kLanes] of a head tile into weights in place. `rescale` [kLanes]
// is the factor, one a head, by which the sums so far shrink.
template <int HT, class F>
VP_INLINE void softmax_tile(float* x, int stride, int tiles, const BlockVisual* block,
                            const SoftmaxArgs& a, TileState& s, float* rescale, const F& beside) {
  const Lanes old = Lanes::load(s.m), most = largest_of(x, stride, tiles, old);
  Lanes m = old, exponent = old;
  if (__builtin_expect(lies_below(most, old, slack_of(a)), 1)) {
    for (int j = 0; j < kTileVecs; ++j) m.vec[j] = vsafe_max(m.vec[j]);
    return add_weights<true>(x, stride, tiles, block, a, s, m, exponent, rescale, beside);
  }
  m = spread_max<HT>(most);
  Lanes::store(s.m, m);
  for (int j = 0; j < kTileVecs; ++j) {
    m.vec[j] = vsafe_max(m.vec[j]);
    exponent.vec[j] = vsub(old.vec[j], m.vec[j]);
  }
  add_weights<false>(x, stride, tiles, block, a, s, m, exponent, rescale, beside);
}

// The factors by which the sums so far shrink, for each head tile.
struct Rescales {
  alignas(64) float tile[kMaxGroup / 4][kLanes];
};

// Turns the logits x of a block into weights, and adds them to the statistics. `beside` is called
// with the phase at each of its tiles.
template <int HT, class F>
VP_INLINE void softmax_block(int tiles, int keys, const BlockVisual* block, const SoftmaxArgs& a,
                             float* x, TileState* states, Rescales& rescales, const F& beside) {
  constexpr int kTileKeys = kLanes / HT;
  const int key_tiles = (keys + kTileKeys - 1) / kTileKeys;
  for (int t = 0; t < tiles; ++t)
    softmax_tile<HT>(x + t * kLanes, tiles * kLanes, key_tiles, block, a, states[t],
                     rescales.tile[t], beside);
}

// Finds the visual tokens among the keys [from, from + keys). `span`, the first that can hold one,
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
  const int lanes = (keys * HT + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < lanes; ++i) out.visual_lanes[i] = 0;
  for (int s = span; s < v.spans_per_row && spans[2 * s] < end; ++s) {
    const int begin = spans[2 * s] > from ? spans[2 * s] - from : 0;
    const int stop = (spans[2 * s + 1] < end ? spans[2 * s + 1] : end) - from;
    for (int i = begin * HT; i < stop * HT; ++i) out.visual_lanes[i] = 0xffffffffu;
  }
  for (int i = 0; i < lanes; ++i) out.text_lanes[i] = ~out.visual_lanes[i];
}

}  // namespace visionpulse::cpu::VP_ISA
