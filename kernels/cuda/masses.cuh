// SPDX-License-Identifier: Apache-2.0
// The masses of a row, from the statistics of its heads, for whole warps. Heads are added in
// ascending order and a NaN in any head makes both NaN, as masses_of_heads does in one thread.
#pragma once

#include "kernels/common/budget.h"
#include "kernels/cuda/args.h"
#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

struct HeadMasses {
  const float* stats;  // [H, kHeadStats] of the row
  int32_t heads;
  float own;  // of head `lane`

  // `all` nullptr: there are none.
  __device__ __forceinline__ HeadMasses(const float* all, int32_t b, int32_t count)
      : stats(all + static_cast<int64_t>(b) * count * kHeadStats),
        heads(all ? count : 0),
        own(of(0)) {}

  // 0 past the last head, which changes neither the maximum nor the sum.
  __device__ __forceinline__ float of(int32_t first) const {
    const int32_t h = first + lane_id();
    return h < heads ? stats[h * kHeadStats + 2] : 0.0f;
  }

  // A mass is no less than +0, and then numbers sort as their words do, with NaN above all.
  __device__ __forceinline__ float max() const {
    uint32_t top = 0;
    VP_UNROLL_1 for (int32_t first = 0; first < heads; first += kThreadsPerWarp) {
      const float mass = first == 0 ? own : of(first);
      top = float_word(mass) > top ? float_word(mass) : top;
    }
    return bits_float(__reduce_max_sync(kAllLanes, top));
  }

  __device__ __forceinline__ float mean() const {
    float sum = 0.0f;
    VP_UNROLL_1 for (int32_t first = 0; first < heads; first += kThreadsPerWarp) {
      const float mass = first == 0 ? own : of(first);
      VP_UNROLL for (int lane = 0; lane < kThreadsPerWarp; ++lane) {
        sum += __shfl_sync(kAllLanes, mass, lane);
      }
    }
    return sum / static_cast<float>(heads);
  }
};

}  // namespace visionpulse::cuda
