// SPDX-License-Identifier: Apache-2.0
// The arguments of the CUDA kernels, filled by csrc/cuda and passed by value. No pointer is owned.
#pragma once

#include "kernels/common/args.h"
#include "kernels/common/split.h"

namespace visionpulse::cuda {

constexpr int kThreadsPerWarp = 32;
constexpr int kMaxWarps = 4;
// Blocks of a stream kernel on a multiprocessor, which is what shared memory allows: no register is
// spilled for more.
constexpr int kResidentStreams = 2;

// Which logits a scoring pass leaves behind: none, those of visual keys by visual index (visual
// tokens of the row in front), or those of all keys by position.
enum class Keep : int32_t { kNone = 0, kVisual = 1, kAll = 2 };

// Final numbers of a query head, [B, H, 3]: log2 of the softmax denominator at temperature 1 and at
// tau (+inf where it is 0), and the visual mass.
constexpr int kHeadStats = 3;
// Numbers of a head in one part of a row: maximum, and sums at 1, at tau, and at tau over visual.
constexpr int kPartStats = 4;

struct StreamArgs {
  CacheArgs kv;
  VisualArgs visual;        // spans nullptr: no visual set
  SelectionArgs selection;  // indices nullptr: all visible keys
  const void* q;            // [B, H, D], last stride 1
  void* out;                // [B, H, D], last stride 1; nullptr: scores only
  HeadStrides q_stride, out_stride;
  float scale, softcap, inverse_tau;
  int32_t window;    // 0: none
  int32_t heads;     // H
  int32_t kv_heads;  // G
  int32_t group;     // H / G
  int32_t head_dim;  // D before padding
  int32_t team;      // warps that share a tile, each for query heads of its own: 1, 2 or 4
  int32_t stages;
  int32_t align;             // bytes that every row of K and V starts at a multiple of
  int32_t k_bytes, v_bytes;  // of one team's stage; 0: not loaded
  int32_t check_list;        // indices may name text: look each one up
  int32_t bulk;              // tiles that lie in memory as they are used come by the copy engine
  SplitRule rule;            // over keys of one KV head
  int32_t max_splits;
  float* part_stats;   // [B, G, max_splits, team * warp rows, kPartStats]
  float* part_out;     // [B, G, max_splits, team * warp rows, padded D]
  uint32_t* counters;  // [B, G], zero between launches
  Keep keep;
  float* logits;      // [B, H, logits_row], as `keep` says: written by score
  const float* kept;  // those of kAll, read by attend in place of K; nullptr: K
  float* sums;        // [B, G * team, logits_row] logits summed over a warp's heads, as `keep` says
  int64_t logits_row;
  float* stats;  // [B, H, kHeadStats]: written by score
};

struct RankArgs {
  CacheArgs kv;  // where its rows begin and end, and which pages it has
  VisualArgs visual;
  int32_t window;
  int32_t heads;
  int32_t sum_parts;  // rows of `sums` that a score is the sum of
  ScoreKind kind;
  float inverse_tau;
  const float* logits;  // [B, H, logits_row]
  const float* sums;    // [B, sum_parts, logits_row]
  int64_t logits_row;
  bool logits_by_position, scores_by_position;  // else by visual index
  const float* stats;                           // [B, H, kHeadStats]
  float* scores;       // [B, scores_row]; by position it holds -inf where there is no candidate
  int64_t scores_row;  // N, or the most visual tokens of a row
  float* mass;         // [B]; nullptr: the select kernel writes it
  float* mass_mean;    // [B]
};

struct SelectArgs {
  CacheArgs kv;  // where its rows begin and end, and which pages it has
  VisualArgs visual;
  int32_t window;
  // The score of a candidate is weight * (sum over `parts` of scores[b, part, place]).
  const float* scores;
  int64_t scores_row, scores_part;
  int32_t parts;
  float weight;
  bool by_position;    // the place is a position, else a visual index
  const float* stats;  // [B, H, kHeadStats], from which the masses come; nullptr: they are given
  int32_t heads;
  float* mass;            // [B] read when stats is nullptr, else written
  float* mass_mean;       // [B]
  const float* ratio;     // [B] in place of the mass, or nullptr
  const int32_t* wanted;  // [B] in place of the budget, or nullptr
  float r_min, r_max;
  int32_t mean_mass;
  int32_t k_max;
  int32_t blocks;    // of a row
  int32_t cached;    // keys, and positions, that a block has shared memory for
  int32_t* indices;  // [B, K_max]
  int32_t* counts;   // [B]
  // Of the candidates that do not fit there, or are handed over:
  uint32_t* keys;       // [B, keys_row]
  uint32_t* positions;  // [B, keys_row] of those that are listed
  int64_t keys_row;
  // Where several blocks serve a row without a cluster, what the last one takes over:
  uint32_t* bins;      // [B, blocks, kSelectBins] histograms of the leading bits
  uint32_t* counters;  // [B], zero between launches
};

// What the host must know of a stream kernel to launch it.
struct StreamKernel {
  const void* function;
  const char* name;
  int32_t keys;          // of a tile, which one team of warps takes at once
  int32_t row_tile;      // query heads that a block may hold
  int32_t warp_rows;     // query heads that one warp holds
  int32_t padded_dim;    // D it is compiled for
  int32_t query_bytes;   // shared memory for the q of one warp's heads
  int32_t warp_bytes;    // shared memory of one warp beside its stages
  int32_t tile_bytes;    // of K or V in a stage
  bool in_place;         // rows of a tile have no gap
  int32_t reduce_bytes;  // of one warp, at the end
};

// nullptr where there is no such kernel: row tiles 4 and 32 for float32, else 8 and 32.
const StreamKernel* attend_kernel(DType dtype, int32_t head_dim, int32_t row_tile);
const StreamKernel* score_kernel(DType dtype, int32_t head_dim, int32_t row_tile);
const void* rank_kernel();
const void* select_kernel(bool cluster);

// Shared memory of a warp for each stage: where its keys are, and what counts its bytes in.
VP_HD int32_t stage_extra_bytes(int32_t keys) { return keys * 4 + 16; }

constexpr int kRankThreads = 256;
constexpr int kSelectThreads = 512;
constexpr int kSelectBlocks = 8;  // of a row: a cluster where the chip has them
constexpr int kSelectBins = 2048;
// Shared memory of the select kernel beside the cached keys.
int32_t select_fixed_bytes();

}  // namespace visionpulse::cuda
