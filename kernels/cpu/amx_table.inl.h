// SPDX-License-Identifier: Apache-2.0
// The table of AVX-512 with bfloat16, with kernels of AMX where they take the call. A file of isa/
// names the set and includes simd_avx512.h first.
#pragma once

#include "kernels/cpu/amx_shared.inl.h"
#include "kernels/cpu/table.inl.h"

namespace visionpulse::cpu::VP_ISA {

// Places in the order of storage_of; the last is kFloat8 beside q in bfloat16.
constexpr int kAmxBf16 = static_cast<int>(DType::kBFloat16), kAmxF8 = kStorages - 1;
constexpr int kFloat = static_cast<int>(DType::kFloat32), kHalf = static_cast<int>(DType::kFloat16);

template <class T, class S>
static void stream_amx(const Call& c, int row, int kv_head, int part, Run run) {
  if (!takes_amx(c)) return stream_any<S>(c, row, kv_head, part, run);
  stream_part<T, 4>(c, row, kv_head, part, run);
}

template <class T, class S>
static void weigh_amx(const Call& c, int row, int kv_head, int part, Run run) {
  if (!takes_amx(c)) return weigh_any<S>(c, row, kv_head, part, run);
  weigh_part<T, 4>(c, row, kv_head, part, run);
}

// Tiles are configured once for all parts of a turn: for each it would take 2 % of a short row.
// Heads of all queries fill whole tiles, whatever the group and D: the packed q, K and V are
// padded.
static void run_with_tiles(const Call& c, void (*run)(void* context), void* context) {
  const int type = storage_of(c), group = c.H / c.G;
  if ((type != kAmxBf16 && type != kAmxF8) || !(c.shared || takes_amx(c))) return run(context);
  AmxScope scope;
  AmxScope::enter(scope, c.shared ? kAmxHeads : padded_heads(group),
                  c.shared ? kAmxHeads : amx_sum_rows(group));
  run(context);
  AmxScope::leave(scope);
}

// Streams of every type ask for K and V as this CPU likes it; every other kernel is that of
// avx512_bf16.
static Kernels with_amx(const char* name) {
  Kernels kernels = kAvx512Bf16;
  kernels.name = name;
  kernels.around_parts = run_with_tiles;
  kernels.stream[kFloat] = stream_any<float>;
  kernels.stream[kHalf] = stream_any<f16>;
  kernels.stream[kAmxBf16] = stream_amx<amx_bf16, bf16>;
  kernels.stream[kAmxF8] = stream_amx<amx_f8, f8_as_bf16>;
  kernels.weigh[kAmxBf16] = weigh_amx<amx_bf16, bf16>;
  kernels.weigh[kAmxF8] = weigh_amx<amx_f8, f8_as_bf16>;
  kernels.stream_shared[kAmxBf16] = stream_shared<amx_bf16>;
  kernels.stream_shared[kAmxF8] = stream_shared<amx_f8>;
  return kernels;
}

}  // namespace visionpulse::cpu::VP_ISA
