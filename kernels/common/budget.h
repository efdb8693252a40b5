// SPDX-License-Identifier: Apache-2.0
// From the masses of the heads to K, the count of visual tokens that a row keeps.
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

// The retention ratio of a row. A NaN keeps the most: it fails open.
VP_HD float clamped_ratio(float mass, float r_min, float r_max) {
  if (mass != mass) return r_max;
  const float low = mass < r_min ? r_min : mass;
  return low > r_max ? r_max : low;
}

// K = floor(float32(ratio) * float32(N_v)), at least 1 unless the row has no visual token.
VP_HD int32_t count_of_ratio(float ratio, int32_t n_visual) {
  if (n_visual <= 0) return 0;
  const float product = ratio * static_cast<float>(n_visual);
  const int32_t count = static_cast<int32_t>(product);
  if (count < 1) return 1;
  return count > n_visual ? n_visual : count;
}

// K that the caller wants, clamped to what the row has.
VP_HD int32_t count_of_wanted(int32_t wanted, int32_t n_visual) {
  if (wanted < 0) return 0;
  return wanted > n_visual ? n_visual : wanted;
}

// The masses of a row. A NaN in any head makes both NaN.
struct Masses {
  float max, mean;
};

VP_HD Masses masses_of_heads(const float* mass /* [H] */, int32_t heads) {
  Masses masses = {0.0f, 0.0f};
  float sum = 0.0f;
  for (int32_t h = 0; h < heads; ++h) {
    if (!(mass[h] <= masses.max)) masses.max = masses.max != masses.max ? masses.max : mass[h];
    sum += mass[h];
  }
  masses.mean = sum / static_cast<float>(heads);
  return masses;
}

}  // namespace visionpulse
