// SPDX-License-Identifier: Apache-2.0
// The arguments of the CUDA kernels: filled by csrc/cuda, passed by value. No pointer is owned.
#pragma once

#include "kernels/common/args.h"
#include "kernels/common/split.h"

namespace visionpulse::cuda {

constexpr int kThreadsPerWarp = 32;
constexpr int kMaxWarps = 4;  // of a stream block
// Stream blocks that share a multiprocessor. Shared memory allows no more, so no register is
// spilled for more.
constexpr int kResidentBlocks = 2;

// Which logits a scoring pass stores: none; those of visual keys, at their index among the row's
// visual tokens; or those of all keys, at their position.
enum class StoredLogits : int32_t { kNone = 0, kVisual = 1, kAll = 2 };

// The statistics of a query head, [B, H, 3]: log2 of the softmax denominator at temperature 1 and
// at tau (+inf where the denominator is 0), and the visual mass.
constexpr int kHeadStats = 3;
// The state of a head in one part of a row: maximum, sums at 1, at tau, and at tau over visual
// keys.
constexpr int kPartStats = 4;

// How the splits of a row are merged, by their number alone: all by the block that arrives last; or
// those of each group, of `fan` splits side by side, by its last block, and then the groups.
struct MergeRule {
  int32_t at_once;  // splits that are merged without groups, at most
  int32_t fan;
  int32_t steps;  // of kSplitsAhead parts, in each of two batches of copies
};
constexpr int kMostGroups = 8;  // of a row and KV head

// 2^64 / parts, rounded up, of two parts or more. The high half of a product with it is the
// quotient of any number below 2^64 / parts.
VP_HD uint64_t reciprocal_of(int32_t parts) { return ~uint64_t{0} / parts + 1; }

// Both stages that stream keys, score and attend.
struct StreamArgs {
  CacheArgs kv;
  VisualArgs visual;        // spans nullptr: no visual set
  SelectionArgs selection;  // indices nullptr: all visible keys
  const void* q;            // [B, H, D]
  void* out;                // [B, H, D]; nullptr: scores only
  HeadStrides q_stride, out_stride;
  DType dtype;  // of q and the output
  float scale, softcap, inverse_tau;
  int32_t window;    // 0: none
  int32_t heads;     // H
  int32_t kv_heads;  // G; with several queries G * head_blocks
  int32_t group;     // H / G
  int32_t head_dim;  // D before padding
  int32_t team;      // warps that share a tile, each for query heads of its own: 1, 2 or 4
  int32_t team_log2;
  int32_t stages;
  int32_t align;              // bytes: each key and value starts at a multiple of them
  int32_t k_bytes, v_bytes;   // of one stage of one team; 0: not loaded
  int32_t check_list;         // indices may name text: look each one up
  int32_t bulk;               // tiles that lie in memory as they are used come by bulk copies
  SplitRule rule;             // over the keys of one KV head; its tile is that of all teams
  int32_t tile_log2;          // of rule.tile
  uint64_t parts_reciprocal;  // of rule.target_parts
  MergeRule merge;
  int32_t max_splits;
  float* part_stats;   // [B, G, max_splits, team * warp heads, kPartStats]
  float* part_out;     // [B, G, max_splits, team * warp heads, padded D]
  uint32_t* counters;  // [B, G] and [B, G, kMostGroups], zero between launches
  StoredLogits store;
  float* logits;               // [B, H, logits_stride], written by score as `store` says
  const float* stored_logits;  // those of kAll, which attend reads in place of K; nullptr: K
  float* sums;  // [B, G * team, logits_stride] logits summed over a warp's heads; nullptr: none
  int64_t logits_stride;
  float* stats;  // [B, H, kHeadStats], written by score
  // In kernels of several queries of a row, whose logits and statistics are of B * Q rows:
  QueriesArgs queries;
  int32_t head_blocks;       // blocks that the query heads of a KV head are spread over
  int32_t group_reciprocal;  // 2^16 / group, rounded up
};

// Turns stored logits, or sums of logits, into scores.
struct ScoreFinishArgs {
  CacheArgs kv;  // for the visible range and the pages of a row
  VisualArgs visual;
  int32_t window;
  int32_t heads;
  int32_t sum_parts;  // sums of logits that a score is made of
  ScoreKind kind;
  float inverse_tau;
  const float* logits;  // [B, H, logits_stride]
  const float* sums;    // [B, sum_parts, logits_stride]
  int64_t logits_stride;
  bool logits_by_position, scores_by_position;  // else by visual index
  const float* stats;                           // [B, H, kHeadStats]
  float* scores;          // [B, scores_stride]; by position, -inf where there is no candidate
  int64_t scores_stride;  // N, or the most visual tokens of a row
  float* mass;            // [B]; nullptr: the select kernel writes the masses
  float* mass_mean;       // [B]
};

struct SelectArgs {
  CacheArgs kv;  // for the visible range and the pages of a row
  VisualArgs visual;
  int32_t window;
  // The score of a candidate is weight * (sum over `parts` of scores[b, part, index]).
  const float* scores;
  int64_t scores_stride, part_stride;
  int32_t parts;
  float weight;
  bool by_position;    // the index is a position, else a visual index
  const float* stats;  // [B, H, kHeadStats], which the masses come from; nullptr: from the caller
  int32_t heads;
  float* mass;            // [B], written; read where stats is nullptr
  float* mass_mean;       // [B]
  const float* ratio;     // [B] in place of the mass, or nullptr
  const int32_t* wanted;  // [B] in place of the budget, or nullptr
  float r_min, r_max;
  int32_t mean_mass;
  int32_t k_max;
  int32_t blocks;    // of a row
  int32_t cached;    // candidates that a block has shared memory for: sort code and position
  int32_t* indices;  // [B, K_max]
  int32_t* counts;   // [B]
  // In global memory, for candidates that do not fit there or go to the last block:
  uint32_t* sort_codes;  // [B, codes_stride]
  uint32_t* positions;   // [B, codes_stride] of listed candidates
  int64_t codes_stride;
  // Where several blocks serve a row without a cluster, what the last one takes over:
  uint32_t* histograms;  // [B, blocks, kSelectBins] of the leading bits
  uint32_t* counters;    // [B], zero between launches
};

// What one warp of a stream kernel holds, in shared memory where it says bytes.
struct WarpTile {
  int32_t heads;         // query heads
  int32_t keys;          // of a tile, which the warps of a team use together
  int32_t query_bytes;   // q of its heads
  int32_t scale_bytes;   // a factor for the logits of each head; 0: the same for all
  int32_t weight_bytes;  // softmax weights of a tile
  int32_t sum_bytes;     // sums of V, when the stages are free
};

// What the host must know of a stream kernel to launch it.
struct StreamKernel {
  const void* function;
  const char* name;
  int32_t head_tile;   // query heads that a block may hold
  int32_t padded_dim;  // D it is compiled for
  WarpTile warp;
  int32_t tile_bytes;  // of K or V in a stage
  bool in_place;       // the keys of a tile have no gap between them
  int32_t resident;    // blocks of a multiprocessor that its registers allow, at least
};

// What stream kernels there are: of one dtype, or of K and V of 8 bits beside q of 16 or 32.
enum class Kind : int32_t { kFloat32, kBFloat16, kFloat16, kFloat8Beside16, kFloat8Beside32 };

VP_HD Kind kind_of(DType query, DType cache) {
  if (cache != DType::kFloat8) return static_cast<Kind>(query);
  return query == DType::kFloat32 ? Kind::kFloat8Beside32 : Kind::kFloat8Beside16;
}

// nullptr where there is no such kernel.
const StreamKernel* attend_kernel(Kind kind, int32_t head_dim, int32_t head_tile);
const StreamKernel* score_kernel(Kind kind, int32_t head_dim, int32_t head_tile);
const void* score_finish_kernel();
const void* select_kernel(bool cluster);

constexpr int kScoreFinishThreads = 256;
constexpr int kSelectThreads = 512;
constexpr int kSelectBlocks = 8;  // of a row: a cluster where the chip has them
constexpr int kSelectBins = 2048;
// Shared memory of the select kernel beside the cached candidates.
int32_t select_fixed_bytes();

}  // namespace visionpulse::cuda
