// SPDX-License-Identifier: Apache-2.0
// What instruction sets without masked loads and compression share. Their own files include it at
// their end.
#pragma once

namespace visionpulse::cpu::VP_ISA {

template <class T>
VP_INLINE void load_tail(const T* p, int n, Vec& a, Vec& b) {
  T whole[2 * kWidth] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  load_unit(whole, a, b);
}

VP_INLINE int write_kept(const uint32_t* codes, int n, int32_t base, uint32_t pivot, int& ties,
                         int32_t* out) {
  int written = 0;
  for (int i = 0; i < n; ++i) {
    const bool tie = codes[i] == pivot && ties > 0;
    ties -= tie;
    if (codes[i] > pivot || tie) out[written++] = base + i;
  }
  return written;
}

VP_INLINE InRange filter_range(const uint32_t* codes, int n, CodeRange range, uint32_t* out) {
  InRange found = {0, 0};
  for (int i = 0; i < n; ++i) {
    const bool above = codes[i] > range.high;
    // writes always, advances only where it counts: no branch to predict
    out[found.count] = codes[i];
    found.count += codes[i] >= range.low && !above;
    found.above += above;
  }
  return found;
}

}  // namespace visionpulse::cpu::VP_ISA
