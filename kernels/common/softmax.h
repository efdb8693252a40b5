// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

VP_HD float minus_infinity() { return -__builtin_huge_valf(); }

// What to subtract before exponentiating: where every logit so far is -inf, 0, for which each of
// them still weighs exp2(-inf) = 0 instead of NaN.
VP_HD float safe_max(float m) { return m == minus_infinity() ? 0.0f : m; }

// The running state of one softmax in powers of two: keys seen so far have the largest logit m and
// sum l = sum exp2(x - safe_max(m)).
struct SoftmaxState {
  float m, l;
};

// The exponent that rescales a part with maximum `m_part` to the common maximum `m_all` >= m_part.
// A part without a finite logit gets -inf: its l is 0, or NaN, which 0 * NaN keeps.
VP_HD float rescale_exponent(float m_part, float m_all) {
  return m_part == minus_infinity() ? minus_infinity() : m_part - safe_max(m_all);
}

// Two states made one, exponentiated by `exp2`; apply it to parts in a fixed order for equal bits.
template <class Exp2>
VP_HD SoftmaxState merged(SoftmaxState a, SoftmaxState b, Exp2 exp2) {
  SoftmaxState both;
  both.m = a.m > b.m ? a.m : b.m;
  both.l = a.l * exp2(rescale_exponent(a.m, both.m)) + b.l * exp2(rescale_exponent(b.m, both.m));
  return both;
}

}  // namespace visionpulse
