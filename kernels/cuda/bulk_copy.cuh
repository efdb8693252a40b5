// SPDX-License-Identifier: Apache-2.0
// The part of the device layer that is new with sm_90: bulk copies. One instruction of one thread
// has the copy engine bring a run of bytes, and an mbarrier in shared memory counts them as they
// arrive.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

// An mbarrier. A phase ends with one arrival and the bytes that it announces; a wait names the
// phase by its parity.
struct alignas(16) CopyBarrier {
  uint64_t state;
};

#if defined(__CUDACC__)

VP_DEVICE void copy_barrier_init(CopyBarrier* at) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(at)) : "memory");
}
// Orders the reads and writes of this thread before the copy engine's next ones.
VP_DEVICE void fence_copy_engine() {
  if constexpr (kBulkCopies) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The arrival of this phase, which announces `bytes`.
VP_DEVICE void copy_barrier_expect(CopyBarrier* at, uint32_t bytes) {
  if constexpr (kBulkCopies) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)),
                 "r"(bytes)
                 : "memory");
  }
}
VP_DEVICE void copy_barrier_wait(CopyBarrier* at, uint32_t phase) {
  if constexpr (kBulkCopies) {
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n.reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(shared_address(at)), "r"(phase)
          : "memory");
    }
  }
}
// Both addresses and `bytes` are multiples of 16.
VP_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, CopyBarrier* at) {
  if constexpr (kBulkCopies) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(at)), "l"(read_once())
        : "memory");
  }
}

#else

VP_DEVICE void copy_barrier_init(CopyBarrier* at) { cusim::copy_barrier_init(at); }
VP_DEVICE void fence_copy_engine() { cusim::fence_copy_engine(); }
VP_DEVICE void copy_barrier_expect(CopyBarrier* at, uint32_t bytes,
                                   cusim::Place place = CUSIM_HERE) {
  cusim::copy_barrier_expect(at, bytes, place);
}
VP_DEVICE void copy_barrier_wait(CopyBarrier* at, uint32_t phase, cusim::Place place = CUSIM_HERE) {
  cusim::copy_barrier_wait(at, phase, place);
}
VP_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, CopyBarrier* at,
                         cusim::Place place = CUSIM_HERE) {
  cusim::bulk_copy(to, from, bytes, at, place);
}

#endif

}  // namespace visionpulse::cuda
