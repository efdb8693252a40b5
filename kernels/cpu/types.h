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
struct f8 {  // e4m3fn
  uint8_t bits;
};
struct f8_as_bf16 {  // the same, where the CPU multiplies it with q as bfloat16
  uint8_t bits;
};

// load_unit and load_tail give this share of what an f8 is: its bits, moved up, are a half 2^8
// times smaller, and whoever scales logits and outputs takes the factor back once.
constexpr float kFloat8Share = 1.0f / 256;
template <class T>
constexpr float kShare = 1.0f;
template <>
constexpr float kShare<f8> = kFloat8Share;

}  // namespace visionpulse::cpu

// Internal linkage, so code compiled for one instruction set is never linked into another.
#define VP_INLINE static inline __attribute__((always_inline))
