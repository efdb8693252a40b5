// SPDX-License-Identifier: Apache-2.0
#define VP_ISA avx512_amx
#define VP_NATIVE_BF16 1
#define VP_ASKS_BY_PAGES 1  // every CPU with AMX is Intel's
#include "kernels/cpu/simd_avx512.h"
#include "kernels/cpu/amx_table.inl.h"

namespace visionpulse::cpu {
const Kernels& amx_kernels() {
  static const Kernels kernels = avx512_amx::with_amx("avx512_amx");
  return kernels;
}
}  // namespace visionpulse::cpu
