// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class ScoreKind : int32_t { kProb = 0, kLogit = 1, kProbTau = 2 };

// Element strides. `outer` steps rows of a contiguous cache, pages of a paged one.
struct Strides {
  int64_t outer, head, token;
};

struct CacheArgs {
  const void* k;           // [B, G, N, D], or pages [P, G, page, D] in any order; last stride 1
  const void* v;           // as k
  const int32_t* starts;   // [B] first key; nullptr: 0
  const int32_t* lengths;  // [B] one past the last key; nullptr: N
  const int32_t* table;    // [B, pages] page ids; nullptr: contiguous
  Strides k_stride, v_stride;
  int64_t table_stride;  // elements from one row's page ids to the next's
  int32_t capacity;      // N
  int32_t page_size;     // 0: contiguous
  int32_t pages;         // P, pages in the pool
};

struct VisualArgs {
  const int32_t* spans;    // [B, S, 2] ascending runs [begin, end), begin = 2^31 - 1 past the last
  const int32_t* offsets;  // [B, S + 1] visual tokens of the row before each run
  int32_t spans_per_row;   // S
};

struct SelectionArgs {
  const int32_t* indices;  // [B, K_max] ascending positions, -1 past count
  const int32_t* counts;   // [B]
  int32_t k_max;
};

struct ScoreArgs {
  float scale;
  float softcap;  // 0: none
  float tau;
  float r_min, r_max;
  int32_t window;  // 0: none
  int32_t k_max;
  ScoreKind kind;
  bool mean_mass;         // the budget follows the mean over heads, not the largest
  const float* ratio;     // [B] in place of the mass; nullptr: the mass
  const int32_t* wanted;  // [B] wanted K in place of the budget; nullptr: the budget
};

}  // namespace visionpulse
