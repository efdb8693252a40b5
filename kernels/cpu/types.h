// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace visionpulse::cpu {

// Storage types. Arithmetic is in float32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace visionpulse::cpu

// Internal linkage, so code compiled for one instruction set is never linked into another.
#define VP_INLINE static inline __attribute__((always_inline))
