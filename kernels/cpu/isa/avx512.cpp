// SPDX-License-Identifier: Apache-2.0
#define VP_ISA avx512
#include "kernels/cpu/simd_avx512.h"
#include "kernels/cpu/table.inl.h"

namespace visionpulse::cpu {
using namespace avx512;
const Kernels kAvx512 = VP_KERNELS("avx512");
}  // namespace visionpulse::cpu
