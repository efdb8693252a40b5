// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace visionpulse::cpu {

// Storage types: arithmetic happens in float32 only.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace visionpulse::cpu

// Every function of the textual kernels has internal linkage and is inlined where it pays, so no
// copy compiled for one instruction set can be linked into another.
#define VP_INLINE static inline __attribute__((always_inline))
