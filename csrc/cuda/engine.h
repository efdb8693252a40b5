// SPDX-License-Identifier: Apache-2.0
// The ops, as launches. Each returns the bytes of scratch memory that it lacks, before any launch,
// or 0 when everything is launched. Nothing is read back, and no size depends on device memory.
#pragma once

#include <cstdint>

#include "csrc/cuda/launch.h"
#include "kernels/common/args.h"

namespace visionpulse::cuda {

struct Call {
  int32_t device;
  cudaStream_t stream;
  CacheArgs cache;
  VisualArgs visual;
  int32_t candidates;       // the most visual tokens of a row
  SelectionArgs selection;  // a follower's
  bool check_list;          // its indices may name text
  ScoreArgs score;
  const void* q;  // [B, H, D] or [B, Q, H, D], last stride 1
  HeadStrides q_stride;
  QueriesArgs queries;
  DType dtype;
  Copies copies;
  int32_t B, H, G, D;
  void* out;  // shaped as q, last stride 1; nullptr: scores only
  HeadStrides out_stride;
  int32_t* indices;         // [B, K_max] written by select
  int32_t* counts;          // [B]
  float *mass, *mass_mean;  // [B]
};

struct Scratch {
  void* bytes;  // aligned to 256 bytes
  int64_t size;
  uint32_t* counters;  // [B * H], zero between calls
};

int64_t attend(const Call& call, const Scratch& scratch);

// Fills `scores` [B, N], the masses, and the dense output if the call has an `out`. With several
// queries scores and masses are of B * Q rows, whose cache and visual tokens `rows` has.
int64_t score(const Call& call, const Call& rows, float* scores, const Scratch& scratch);

// Selection from scores [B, N] and the masses of the call.
int64_t select(const Call& call, const float* scores, const Scratch& scratch);

// Score, select and attend, of one query a row; fills `scores` [B, N] unless it is nullptr.
int64_t decode(const Call& call, bool dense, float* scores, const Scratch& scratch);

}  // namespace visionpulse::cuda
