// SPDX-License-Identifier: Apache-2.0
// The arguments of the CUDA kernels, filled by csrc/cuda and passed by value. No pointer is owned.
#pragma once

#include "kernels/common/args.h"
#include "kernels/common/split.h"

namespace visionpulse::cuda {

constexpr int kThreadsPerWarp = 32;
constexpr int kMaxWarps = 4;

// Which logits a scoring pass leaves behind.
enum class Keep : int32_t { kNone = 0, kVisual = 1, kAll = 2 };

// Final numbers of a query head, [B, H, 3]: log2 of the softmax denominator at temperature 1 and at
// tau (+inf where it is 0), and the visual mass.
constexpr int kHeadStats = 3;
// Numbers of a head in one part of a row: maximum, and sums at 1, at tau, and at tau over visual.
constexpr int kPartStats = 4;

struct StreamArgs {
  CacheArgs kv;
  VisualArgs visual;                         // spans nullptr: no visual set
  SelectionArgs selection;                   // indices nullptr: all visible keys
  const void* q;                             // [B, H, D], last stride 1
  void* out;                                 // [B, H, D], last stride 1; nullptr: scores only
  int64_t q_row, q_head, out_row, out_head;  // element strides
  float scale, softcap, inverse_tau;
  int32_t window;       // 0: none
  int32_t rows;         // B
  int32_t heads;        // H
  int32_t kv_heads;     // G
  int32_t group;        // H / G
  int32_t head_dim;     // D before padding
  int32_t head_blocks;  // blocks that share the query heads of one KV head
  int32_t block_heads;  // query heads of one such block
  int32_t stages;
  int32_t align;             // bytes that every row of K and V starts at a multiple of
  int32_t k_bytes, v_bytes;  // of one warp's stage; 0: not loaded
  int32_t check_list;        // indices may name text: look each one up
  SplitRule rule;            // over keys of one KV head
  int32_t max_splits;
  float* part_stats;   // [B, G * head_blocks, max_splits, row tile, kPartStats]
  float* part_out;     // [B, G * head_blocks, max_splits, row tile, padded D]
  uint32_t* counters;  // [B, G * head_blocks], zero between launches
  Keep keep;
  float* logits;      // [B, H, logits_row] by position: written by score
  const float* kept;  // the same, read by attend in place of K; nullptr: K
  float* sums;        // [B, G * head_blocks, logits_row] logits summed over the block's heads
  int64_t logits_row;
  float* stats;  // [B, H, kHeadStats]: written by score
};

struct RankArgs {
  VisualArgs visual;
  const int32_t* starts;   // [B] or nullptr
  const int32_t* lengths;  // [B] or nullptr
  int32_t window, capacity;
  int32_t heads, head_blocks;  // head_blocks: of all KV heads together
  ScoreKind kind;
  float inverse_tau;
  const float* logits;  // [B, H, logits_row]
  const float* sums;    // [B, head_blocks, logits_row]
  int64_t logits_row;
  const float* stats;  // [B, H, kHeadStats]
  float* scores;       // [B, N], -inf where not a candidate
  int64_t scores_row;
  float* mass;       // [B]; nullptr: the select kernel writes it
  float* mass_mean;  // [B]
};

struct SelectArgs {
  VisualArgs visual;
  const int32_t* starts;   // [B] or nullptr
  const int32_t* lengths;  // [B] or nullptr
  int32_t window, capacity;
  // The score of a position is weight * (sum over `parts` of scores[b, part, position]).
  const float* scores;
  int64_t scores_row, scores_part;
  int32_t parts;
  float weight;
  const float* stats;  // [B, H, kHeadStats], from which the masses come; nullptr: they are given
  int32_t heads;
  float* mass;            // [B] read when stats is nullptr, else written
  float* mass_mean;       // [B]
  const float* ratio;     // [B] in place of the mass, or nullptr
  const int32_t* wanted;  // [B] in place of the budget, or nullptr
  float r_min, r_max;
  int32_t mean_mass;
  int32_t k_max;
  int32_t cluster;   // blocks of a row
  int32_t cached;    // keys a block keeps in shared memory
  int32_t* indices;  // [B, K_max]
  int32_t* counts;   // [B]
};

// What the host must know of a stream kernel to launch it.
struct StreamKernel {
  const void* function;
  const char* name;
  int32_t keys;          // of a tile, which one warp takes at once
  int32_t row_tile;      // query heads it holds
  int32_t padded_dim;    // D it is compiled for
  int32_t query_bytes;   // shared memory for q
  int32_t warp_bytes;    // shared memory of one warp beside its stages
  int32_t tile_bytes;    // of K or V in a stage
  int32_t reduce_bytes;  // of one warp, at the end
};

// nullptr where there is no such kernel: row tile 4 for fp32 and 16-bit, 8 for all, 16 for 16-bit.
const StreamKernel* attend_kernel(DType dtype, int32_t head_dim, int32_t row_tile);
const StreamKernel* score_kernel(DType dtype, int32_t head_dim, int32_t row_tile);
const void* rank_kernel();
const void* select_kernel(bool cluster);

constexpr int kRankThreads = 256;
constexpr int kSelectThreads = 512;
constexpr int kSelectCluster = 8;
// Shared memory of the select kernel beside the cached keys.
int32_t select_fixed_bytes();

}  // namespace visionpulse::cuda
