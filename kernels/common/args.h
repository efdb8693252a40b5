// SPDX-License-Identifier: Apache-2.0
// The arguments that both native engines take. Strides count elements; the last stride is always 1.
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

constexpr int32_t kMaxGroup = 32;  // query heads of one KV head
constexpr int32_t kMaxHeadDim = 256;
constexpr int32_t kMaxQueries = 16;  // of a row

// Of q, K, V and the output; K and V alone may be kFloat8 (e4m3fn), beside q in any other.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8 = 3 };
enum class ScoreKind : int32_t { kProb = 0, kLogit = 1, kProbTau = 2 };
enum class MassOf : int32_t { kMax = 0, kMean = 1 };  // the mass over heads that sets the budget

// Of K or V. `outer` leads to the next row of a contiguous cache, or to the next page of a paged
// one.
struct Strides {
  int64_t outer, head, token;
};

// Of q or the output, [B, H, D] or [B, Q, H, D].
struct HeadStrides {
  int64_t row, head;
};

// What stored K or V of kFloat8 are multiplied with: the logits take K's, the output takes V's.
struct CacheScale {
  const float* values;  // [G], or one number; nullptr: 1
  int32_t stride;       // 0: one number for all KV heads
};

VP_HD float scale_of(const CacheScale& scale, int32_t kv_head) {
  return scale.values == nullptr ? 1.0f : scale.values[kv_head * scale.stride];
}

// Several queries of a row: query i of Q has its own key at length - Q + i.
struct QueriesArgs {
  int32_t count = 1;                     // Q
  int64_t q_stride = 0, out_stride = 0;  // from one query of a row to the next
  const int32_t* real = nullptr;         // [B] the last ones, which are real; nullptr: all
};

struct CacheArgs {
  const void* k;           // [B, G, N, D], or pages [P, G, page, D] in any order
  const void* v;           // as k
  const int32_t* starts;   // [B] first key; nullptr: 0
  const int32_t* lengths;  // [B] one past the last key; nullptr: N
  const int32_t* table;    // [B, pages] page ids; nullptr: contiguous
  Strides k_stride, v_stride;
  int64_t table_stride;  // from the page ids of a row to those of the next
  int32_t capacity;      // N
  int32_t page_size;     // 0: contiguous
  int32_t pages;         // P, pages in the pool
  DType dtype;           // of k and v
  CacheScale k_scale, v_scale;
};

struct VisualArgs {
  const int32_t* spans;    // [B, S, 2] ascending [begin, end); kNoSpan past the last
  const int32_t* offsets;  // [B, S + 1] visual tokens of the row before each span
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
  MassOf mass_of;
  const float* ratio;     // [B] in place of the mass; nullptr: the mass
  const int32_t* wanted;  // [B] K in place of the budget; nullptr: the budget
};

}  // namespace visionpulse
