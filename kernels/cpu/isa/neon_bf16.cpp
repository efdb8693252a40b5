// SPDX-License-Identifier: Apache-2.0
#define VP_ISA neon_bf16
#include "kernels/cpu/simd_neon_bf16.h"
#include "kernels/cpu/table.inl.h"

namespace visionpulse::cpu {
using namespace neon_bf16;
const Kernels kNeonBf16 = VP_KERNELS("neon_bf16");
}  // namespace visionpulse::cpu
