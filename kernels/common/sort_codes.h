// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/float_bits.h"

namespace visionpulse {

// An integer that orders as the score does. NaN gets 0, which is below the code of -inf. Both zeros
// get one code, so equal scores have equal codes.
VP_HD uint32_t sort_code(float score) {
  uint32_t bits = float_bits(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if (bits == 0x80000000u) bits = 0;
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

}  // namespace visionpulse
