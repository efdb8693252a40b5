// SPDX-License-Identifier: Apache-2.0
// What the tensor-core instructions do to the registers of a warp, lane by lane.
#pragma once

#include "cusim.h"

namespace cusim {

struct Fragment {
  uint32_t word[6];
};

inline uint16_t half_of(uint32_t word, unsigned which) { return word >> (16 * which) & 0xffff; }

// Four 8x8 matrices of 16-bit elements; lane l holds the address of row l % 8 of matrix l / 8.
inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed, Place place) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: misaligned row", place);
  const auto* slots = exchange(0xffffffffu, row, "ldmatrix", place);
  const unsigned lane = machine.current->linear & 31;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r = transposed ? lane % 4 * 2 + i : lane / 4;
      const unsigned c = transposed ? lane / 4 : lane % 4 * 2 + i;
      const auto* from = slot_value<const uint16_t*>(slots, matrix * 8 + r);
      pair[i] = from[c];
    }
    out[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// An 8x8 matrix of 16-bit elements, two of a row per lane, turned.
inline uint32_t transpose_matrix(uint32_t value, Place place) {
  const auto* slots = exchange(0xffffffffu, value, "movmatrix", place);
  const unsigned lane = machine.current->linear & 31;
  uint32_t out = 0;
  for (unsigned i = 0; i < 2; ++i) {
    const unsigned row = lane % 4 * 2 + i, column = lane / 4;
    const auto word = slot_value<uint32_t>(slots, row * 4 + column / 2);
    out |= static_cast<uint32_t>(half_of(word, column % 2)) << (16 * i);
  }
  return out;
}

// m16n8k16, a row-major, b column-major, float32 accumulators.
template <class ToFloat>
void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      ToFloat to_float, Place place) {
  const Fragment mine = {{a[0], a[1], a[2], a[3], b0, b1}};
  const auto* slots = exchange(0xffffffffu, mine, "mma", place);
  const unsigned lane = machine.current->linear & 31;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned m = lane / 4 + (i / 2) * 8, n = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const auto from_a = slot_value<Fragment>(slots, m % 8 * 4 + k % 8 / 2);
      const auto from_b = slot_value<Fragment>(slots, n * 4 + k % 8 / 2);
      const uint32_t a_word = from_a.word[m / 8 + k / 8 * 2];
      const uint32_t b_word = from_b.word[4 + k / 8];
      sum = std::fma(to_float(half_of(a_word, k % 2)), to_float(half_of(b_word, k % 2)), sum);
    }
    c[i] = sum;
  }
}

}  // namespace cusim
