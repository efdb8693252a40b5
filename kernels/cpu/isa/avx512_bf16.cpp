// SPDX-License-Identifier: Apache-2.0
#define VP_ISA avx512_bf16
#define VP_NATIVE_BF16 1
#include "kernels/cpu/simd_avx512.h"
#include "kernels/cpu/table.inl.h"

namespace visionpulse::cpu {
using namespace avx512_bf16;
const Kernels kAvx512Bf16 = VP_KERNELS("avx512_bf16");
}  // namespace visionpulse::cpu
