// SPDX-License-Identifier: Apache-2.0
// The part of CUDA C++ that the kernels write down themselves.
#pragma once

#include "cusim.h"

#if defined(__CUDA_ARCH__)
namespace {
[[maybe_unused]] const bool cusim_compiled = (cusim::compiled_for = __CUDA_ARCH__ / 10, true);
}
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (cusim::machine.current->index)
#define blockIdx (cusim::machine.current->block->index)
#define blockDim (cusim::machine.block)
#define gridDim (cusim::machine.grid)

inline void __syncthreads(cusim::Place place = CUSIM_HERE) { cusim::block_barrier(place); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, cusim::Place place = CUSIM_HERE) {
  cusim::exchange(mask, 0, "__syncwarp", place);
}

inline unsigned cusim_lane() { return cusim::machine.current->linear & 31; }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, cusim::Place place = CUSIM_HERE) {
  const unsigned base = cusim_lane() & ~(width - 1u);
  return cusim::shuffle(mask, value, base + (source & (width - 1)), "__shfl_sync", place);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  cusim::Place place = CUSIM_HERE) {
  (void)width;
  return cusim::shuffle(mask, value, cusim_lane() ^ bits, "__shfl_xor_sync", place);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32,
                 cusim::Place place = CUSIM_HERE) {
  const unsigned lane = cusim_lane();
  const unsigned source = (lane & (width - 1)) >= by ? lane - by : lane;
  return cusim::shuffle(mask, value, source, "__shfl_up_sync", place);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, cusim::Place place = CUSIM_HERE) {
  const auto* slots = cusim::exchange(mask, predicate, "__ballot_sync", place);
  mask &= cusim::lanes_that_exist(*cusim::machine.current);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && cusim::slot_value<int>(slots, lane)) votes |= 1u << lane;
  }
  return votes;
}
inline unsigned __reduce_max_sync(uint32_t mask, unsigned value, cusim::Place place = CUSIM_HERE) {
  for (int bit = 1; bit < 32; bit *= 2) {
    const unsigned other =
        cusim::shuffle(mask, value, cusim_lane() ^ bit, "__reduce_max_sync", place);
    value = other > value ? other : value;
  }
  return value;
}
inline int __any_sync(uint32_t mask, int predicate, cusim::Place place = CUSIM_HERE) {
  return __ballot_sync(mask, predicate, place) != 0;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }

// One fiber runs at a time, so plain reads and writes are atomic.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
inline unsigned atomicInc(unsigned* at, unsigned last, cusim::Place place = CUSIM_HERE) {
  cusim::arrive(place);
  const unsigned before = *at;
  *at = before >= last ? 0 : before + 1;
  return before;
}
