// SPDX-License-Identifier: Apache-2.0
// The part of the device layer that is new with sm_90: the copy engine brings a run of bytes by one
// instruction of one thread, and a barrier in shared memory counts them as they land.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

// One arrival and the bytes it announces end a phase; phases are told apart by their last bit.
struct alignas(16) Landing {
  uint64_t state;
};

#if defined(__CUDACC__)

VP_DEVICE void landing_start(Landing* at) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(at)) : "memory");
}
// What threads have read or written so far comes before what the copy engine does next.
VP_DEVICE void fence_copy_engine() {
  if constexpr (kBulkCopies) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// This phase's arrival; `bytes` are still to come.
VP_DEVICE void landing_expect(Landing* at, uint32_t bytes) {
  if constexpr (kBulkCopies) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)),
                 "r"(bytes)
                 : "memory");
  }
}
VP_DEVICE void landing_wait(Landing* at, uint32_t phase) {
  if constexpr (kBulkCopies) {
    uint32_t landed = 0;
    while (!landed) {
      asm volatile(
          "{\n.reg .pred landed;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 landed, [%1], %2;\n"
          "selp.u32 %0, 1, 0, landed;\n}"
          : "=r"(landed)
          : "r"(shared_address(at)), "r"(phase)
          : "memory");
    }
  }
}
// All three are multiples of 16 bytes.
VP_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, Landing* at) {
  if constexpr (kBulkCopies) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(at))
        : "memory");
  }
}

#else

VP_DEVICE void landing_start(Landing* at) { cusim::landing_start(at); }
VP_DEVICE void fence_copy_engine() { cusim::fence_copy_engine(); }
VP_DEVICE void landing_expect(Landing* at, uint32_t bytes, cusim::Place place = CUSIM_HERE) {
  cusim::landing_expect(at, bytes, place);
}
VP_DEVICE void landing_wait(Landing* at, uint32_t phase, cusim::Place place = CUSIM_HERE) {
  cusim::landing_wait(at, phase, place);
}
VP_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, Landing* at,
                         cusim::Place place = CUSIM_HERE) {
  cusim::bulk_copy(to, from, bytes, at, place);
}

#endif

}  // namespace visionpulse::cuda
