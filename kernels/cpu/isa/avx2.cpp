// SPDX-License-Identifier: Apache-2.0
#define VP_ISA avx2
#include "kernels/cpu/simd_avx2.h"
#include "kernels/cpu/table.inl.h"

namespace visionpulse::cpu {
using namespace avx2;
const Kernels kAvx2 = VP_KERNELS("avx2");
}  // namespace visionpulse::cpu
