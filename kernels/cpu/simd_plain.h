// SPDX-License-Identifier: Apache-2.0
// What instruction sets without masked loads and compression share; included behind their own file.
#pragma once

namespace visionpulse::cpu::VP_ISA {

template <class T>
VP_INLINE void load_tail(const T* p, int n, Vec& a, Vec& b) {
  T whole[2 * kWidth] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  load_unit(whole, a, b);
}

VP_INLINE int emit_kept(const uint32_t* keys, int n, int32_t base, uint32_t pivot, int& ties,
                        int32_t* out) {
  int written = 0;
  for (int i = 0; i < n; ++i) {
    const bool tie = keys[i] == pivot && ties > 0;
    ties -= tie;
    if (keys[i] > pivot || tie) out[written++] = base + i;
  }
  return written;
}

VP_INLINE int keep_digit(const uint32_t* keys, int n, int shift, uint32_t digit, uint32_t* out) {
  int written = 0;
  for (int i = 0; i < n; ++i) {
    // written always, kept only when it counts: no branch to predict
    out[written] = keys[i];
    written += keys[i] >> shift == digit;
  }
  return written;
}

}  // namespace visionpulse::cpu::VP_ISA
