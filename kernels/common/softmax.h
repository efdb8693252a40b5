// SPDX-License-Identifier: Apache-2.0
// Softmax in powers of two, computed in parts: a part has the largest logit m and the sum
// l = sum exp2(x - safe_max(m)).
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

VP_HD float minus_infinity() { return -__builtin_huge_valf(); }

// The number to subtract before exponentiating. Where every logit is -inf it is 0, because
// exp2(-inf - 0) is 0 while exp2(-inf + inf) is NaN.
VP_HD float safe_max(float m) { return m == minus_infinity() ? 0.0f : m; }

// The exponent that rescales a part with maximum `m_part` to the common maximum `m_all` >= m_part.
// A part without a finite logit gets -inf: its l is 0, or NaN, which 0 * NaN keeps.
VP_HD float rescale_exponent(float m_part, float m_all) {
  return m_part == minus_infinity() ? minus_infinity() : m_part - safe_max(m_all);
}

}  // namespace visionpulse
