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
    // One thread's order is enough, since a barrier hands it on: the fence makes the writes of the
    // block visible before its arrival, the acquire its reads newer than all arrivals.
    memory_fence();
    *flag = count_and_acquire(counter, blocks - 1) == blocks - 1;
  }
  __syncthreads();
  const bool last = *flag != 0;
  __syncthreads();  // the caller may reuse the flag's memory
  return last;
}

}  // namespace visionpulse::cuda
