// SPDX-License-Identifier: Apache-2.0
// The table of AVX-512 with bfloat16, with kernels of AMX where they take the call. A file of isa/
// names the set and includes simd_avx512.h first.
#pragma once

#include "kernels/cpu/amx.inl.h"
#include "kernels/cpu/attend.inl.h"

namespace visionpulse::cpu::VP_ISA {

static void stream_amx(const Call& c, int row, int kv_head, int part, Run run) {
  constexpr int kType = static_cast<int>(DType::kBFloat16);
  if (!takes_amx(c)) return kAvx512Bf16.stream[kType](c, row, kv_head, part, run);
  AmxScope scope;
  AmxScope::enter(scope, padded_heads(c.H / c.G));
  stream_part<amx_bf16, 4>(c, row, kv_head, part, run);
  AmxScope::leave(scope);
}

static void weigh_amx(const Call& c, int row, int kv_head, int part, Run run) {
  constexpr int kType = static_cast<int>(DType::kBFloat16);
  if (!takes_amx(c)) return kAvx512Bf16.weigh[kType](c, row, kv_head, part, run);
  AmxScope scope;
  AmxScope::enter(scope, padded_heads(c.H / c.G));
  weigh_part<amx_bf16, 4>(c, row, kv_head, part, run);
  AmxScope::leave(scope);
}

// Every other kernel, type and shape is that of avx512_bf16.
static Kernels with_amx(const char* name) {
  constexpr int kType = static_cast<int>(DType::kBFloat16);
  Kernels kernels = kAvx512Bf16;
  kernels.name = name;
  kernels.stream[kType] = stream_amx;
  kernels.weigh[kType] = weigh_amx;
  return kernels;
}

}  // namespace visionpulse::cpu::VP_ISA
