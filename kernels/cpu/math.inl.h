// SPDX-License-Identifier: Apache-2.0
// exp2 and tanh by polynomials, the same for every instruction set.
#pragma once

#include "kernels/common/softmax.h"

namespace visionpulse::cpu::VP_ISA {

// 2^x, by a minimax polynomial of 2^f on [-1/2, 1/2]; relative error 7.5e-8. No x overflows here:
// softmax exponents are at most 80 (slack_of), and tanh_full bounds its own.
VP_INLINE Vec exp2_full(Vec x) {
  const Vec n = vround(x), f = vsub(x, n);
  Vec p = vfma(vset(1.327647199e-3f), f, vset(9.675541334e-3f));
  p = vfma(p, f, vset(5.550713274e-2f));
  p = vfma(p, f, vset(2.402211972e-1f));
  p = vfma(p, f, vset(6.931469671e-1f));
  return vscale(x, vfma(p, f, vset(1.000000072f)), n);
}

// The same with relative error 2.6e-6: enough for the mass, whose tolerance is 1e-4.
VP_INLINE Vec exp2_mass(Vec x) {
  const Vec n = vround(x), f = vsub(x, n);
  Vec p = vfma(vset(9.570101912e-3f), f, vset(5.591786032e-2f));
  p = vfma(p, f, vset(2.402474482e-1f));
  p = vfma(p, f, vset(6.931218147e-1f));
  return vscale(x, vfma(p, f, vset(9.999992615e-1f)), n);
}

VP_INLINE float exp2_scalar(float x) {
  alignas(64) float lanes[kWidth];
  vstore(lanes, exp2_full(vset(x)));
  return lanes[0];
}

// An odd polynomial near zero, where 1 - 2 / (e^2y + 1) would cancel.
VP_INLINE Vec tanh_full(Vec x) {
  const Vec y = vabs(x), s = vmul(x, x);
  Vec p = vfma(vset(-5.468268432e-3f), s, vset(2.041519384e-2f));
  p = vfma(p, s, vset(-5.366528067e-2f));
  p = vfma(p, s, vset(1.333041515e-1f));
  p = vfma(p, s, vset(-3.333322927e-1f));
  const Vec small = vfma(vmul(p, s), x, x);
  const Vec bounded = vless(y, vset(20.0f), y, vless(vset(19.0f), y, vset(20.0f), y));
  const Vec e = exp2_full(vmul(bounded, vset(2.0f * kLog2e)));
  const Vec large = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
  return vless(y, vset(0.6f), small, vcopysign(large, x));
}

// safe_max of softmax.h, a register at a time.
VP_INLINE Vec vsafe_max(Vec m) { return vless(m, vset(-3.4028235e38f), vzero(), m); }

}  // namespace visionpulse::cpu::VP_ISA
