// SPDX-License-Identifier: Apache-2.0
#define VP_ISA neon
#include "kernels/cpu/simd_neon.h"
#include "kernels/cpu/table.inl.h"

namespace visionpulse::cpu {
using namespace neon;
const Kernels kNeon = VP_KERNELS("neon");
}  // namespace visionpulse::cpu
