// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

VP_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// A key that orders as the score does: greater score, greater key. NaN takes 0, below -inf, and
// both zeros share one key, so that a tie is a tie of keys.
VP_HD uint32_t ordered_key(float score) {
  uint32_t bits = float_bits(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if (bits == 0x80000000u) bits = 0;
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

}  // namespace visionpulse
