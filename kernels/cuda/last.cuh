// SPDX-License-Identifier: Apache-2.0
// How the blocks of a row hand over to one of them, with no block ever waiting for another.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

// True in all threads of the block that comes last of `blocks`: what the others wrote before is
// there for it. The counter wraps to 0, ready for the next launch. `flag` is shared memory.
VP_DEVICE bool came_last(uint32_t* counter, uint32_t blocks, uint32_t* flag) {
  memory_fence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicInc(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  const bool mine = *flag != 0;
  __syncthreads();  // the flag's memory may be used anew
  memory_fence();
  return mine;
}

}  // namespace visionpulse::cuda
