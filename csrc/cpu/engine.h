// SPDX-License-Identifier: Apache-2.0
// The stages on the host: plan the rows, lay out scratch memory, run the phases on the task pool.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/call.h"

namespace visionpulse::cpu {

struct Scratch {
  void* bytes;
  int64_t size;
  int threads;
};

// Each gives 0 when it has run, or the bytes of scratch it needs and has not got, before writing
// anything.

// Attention over all visible keys, or over text and selected ones where `call.selection` is set.
int64_t attend(const Kernels& kernels, Call call, const Scratch& scratch);

// Scores [B, N] (-inf where there is no candidate) and masses; dense attention too where `call.out`
// is set.
int64_t score(const Kernels& kernels, Call call, float* scores, const Scratch& scratch);

// Selection from scores [B, N] and masses.
int64_t choose(const Kernels& kernels, Call call, const float* scores, const Scratch& scratch);

// score, choose and attention in one: K is read once. `scores` [B, N] is filled unless it is
// nullptr.
int64_t decode(const Kernels& kernels, Call call, bool dense, float* scores,
               const Scratch& scratch);

}  // namespace visionpulse::cpu
