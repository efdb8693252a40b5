// SPDX-License-Identifier: Apache-2.0
// The kernels of avx512_amx over the model.
#define VP_ISA amx_modelled
#define VP_NATIVE_BF16 1
#include "kernels/cpu/simd_avx512.h"
#include "tests/cpp/amx_model.h"
#include "tests/cpp/amx_modelled.h"
#include "kernels/cpu/amx_table.inl.h"

namespace amx_model {

const visionpulse::cpu::Kernels* kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi"))
    return nullptr;
  static const visionpulse::cpu::Kernels modelled =
      visionpulse::cpu::amx_modelled::with_amx("avx512_amx over a model");
  return &modelled;
}

bool takes(const visionpulse::cpu::Call& c) {
  return c.dtype == visionpulse::DType::kBFloat16 &&
         (c.queries.count > 1 || visionpulse::cpu::amx_modelled::takes_amx(c));
}

}  // namespace amx_model
