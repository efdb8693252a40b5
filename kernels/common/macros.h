// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Internal linkage on purpose: these functions are compiled once per instruction set, and a merged
// copy could carry instructions that an older CPU lacks.
#if defined(__CUDACC__)
#define VP_HD static __host__ __device__ __forceinline__
#else
#define VP_HD static inline __attribute__((always_inline))
#endif
