// SPDX-License-Identifier: Apache-2.0
#define VP_ISA baseline
#include "kernels/cpu/simd_generic.h"
#include "kernels/cpu/table.inl.h"

namespace visionpulse::cpu {
using namespace baseline;
const Kernels kBaseline = VP_KERNELS("baseline");
}  // namespace visionpulse::cpu
