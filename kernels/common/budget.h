// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

// The retention ratio of a row: a NaN keeps the most (fail open).
VP_HD float clamped_ratio(float mass, float r_min, float r_max) {
  if (mass != mass) return r_max;
  const float low = mass < r_min ? r_min : mass;
  return low > r_max ? r_max : low;
}

// K = floor(float32(ratio) * float32(N_v)), at least one token where there is any.
VP_HD int32_t count_of_ratio(float ratio, int32_t n_visual) {
  if (n_visual <= 0) return 0;
  const float product = ratio * static_cast<float>(n_visual);
  const int32_t count = static_cast<int32_t>(product);
  if (count < 1) return 1;
  return count > n_visual ? n_visual : count;
}

// K wanted by a policy of its own, cut to what the row has.
VP_HD int32_t count_of_wish(int32_t wanted, int32_t n_visual) {
  if (wanted < 0) return 0;
  return wanted > n_visual ? n_visual : wanted;
}

// What the head masses of a row become: the largest and the mean; a NaN in any head reaches both.
struct Masses {
  float max, mean;
};

VP_HD Masses masses_of_heads(const float* mass /* [H] */, int32_t heads) {
  Masses of = {0.0f, 0.0f};
  float sum = 0.0f;
  for (int32_t h = 0; h < heads; ++h) {
    if (!(mass[h] <= of.max)) of.max = of.max != of.max ? of.max : mass[h];
    sum += mass[h];
  }
  of.mean = sum / static_cast<float>(heads);
  return of;
}

}  // namespace visionpulse
