// SPDX-License-Identifier: Apache-2.0
// The ops of the CPU: plan the rows, lay out the scratch memory, run the phases on the task pool.
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

// Every op returns 0 when it has run. With too little scratch memory it writes nothing and returns
// the bytes that it needs.

// Attention over all visible keys, or over text and kept tokens where `call.selection` is set.
int64_t attend(const Kernels& kernels, Call call, const Scratch& scratch);

// Several queries of a row share the passes over all visible keys; each has scores, a selection and
// lists of its own: rows below are B * Q.

// Scores [B, N], -inf where there is no candidate, and masses; also dense attention where
// `call.out` is set.
int64_t score(const Kernels& kernels, Call call, float* scores, const Scratch& scratch);

// A selection from scores [B, N] and masses.
int64_t select(const Kernels& kernels, Call call, const float* scores, const Scratch& scratch);

// Score, select and attend, reading K once. Fills `scores` [B, N] unless it is nullptr.
int64_t decode(const Kernels& kernels, Call call, bool dense, float* scores,
               const Scratch& scratch);

}  // namespace visionpulse::cpu
