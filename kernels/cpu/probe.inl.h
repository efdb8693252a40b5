// SPDX-License-Identifier: Apache-2.0
// The fastest read of a buffer: the ceiling that benchmarks compare the kernels with.
#pragma once

#include "kernels/common/float_bits.h"

namespace visionpulse::cpu::VP_ISA {

// Maxima, one instruction a load, so nothing but the loads takes time. The result only keeps the
// compiler from leaving the loads out.
static uint64_t read_bytes(const void* bytes, int64_t count) {
  const float* p = static_cast<const float*>(bytes);
  constexpr int kStep = 8 * kWidth;
  Vec largest[8];
  for (int i = 0; i < 8; ++i) largest[i] = vzero();
  for (int64_t at = 0; at + kStep <= count / 4; at += kStep)
    for (int i = 0; i < 8; ++i) largest[i] = vmax_number(vload(p + at + i * kWidth), largest[i]);
  alignas(64) float lanes[kWidth];
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    vstore(lanes, largest[i]);
    for (int j = 0; j < kWidth; ++j) bits ^= float_bits(lanes[j]);
  }
  return bits;
}

}  // namespace visionpulse::cpu::VP_ISA
