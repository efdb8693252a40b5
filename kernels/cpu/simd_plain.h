// SPDX-License-Identifier: Apache-2.0
// What instruction sets without masked loads and compression share. Their own files include it at
// their end.
#pragma once

namespace visionpulse::cpu::VP_ISA {

constexpr bool kStreams = false;
VP_INLINE void vstream(float* p, Vec x) { vstore(p, x); }
VP_INLINE void vstream_end() {}

template <class T>
VP_INLINE void load_tail(const T* p, int n, Vec& a, Vec& b) {
  T whole[2 * kWidth] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  load_unit(whole, a, b);
}

VP_INLINE int write_kept(const uint32_t* codes, const int32_t* positions, int n, uint32_t pivot,
                         int ties, int32_t* out) {
  int written = 0;
  for (int i = 0; i < n; ++i) {
    const bool tie = codes[i] == pivot && ties > 0;
    ties -= tie;
    if (codes[i] > pivot || tie) out[written++] = positions[i];
  }
  return written;
}

VP_INLINE int filter_scores(const float* scores, int n, int32_t base, float least, uint32_t* bits,
                            int32_t* positions) {
  int found = 0;
  for (int i = 0; i < n; ++i) {
    // writes always, advances only where it counts: no branch to predict
    __builtin_memcpy(bits + found, scores + i, sizeof *bits);
    positions[found] = base + i;
    found += scores[i] >= least;
  }
  return found;
}

}  // namespace visionpulse::cpu::VP_ISA
