// SPDX-License-Identifier: Apache-2.0
// How the blocks of a row leave the rest to one of them, without any block waiting for another.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

// True in all threads of the block that arrives last of `blocks`: it sees what the others wrote.
// The counter wraps to 0, ready for the next launch. `flag` is shared memory.
VP_DEVICE bool arrived_last(uint32_t* counter, uint32_t blocks, uint32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    // One thread's fences are enough, since a barrier hands on what they order: the first makes the
    // writes of the block visible before its arrival, the second its reads newer than all arrivals.
    memory_fence();
    *flag = atomicInc(counter, blocks - 1) == blocks - 1;
    memory_fence();
  }
  __syncthreads();
  const bool last = *flag != 0;
  __syncthreads();  // the caller may reuse the flag's memory
  return last;
}

}  // namespace visionpulse::cuda
