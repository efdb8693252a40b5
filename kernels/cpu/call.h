// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernels of every instruction set: one call, its rows, and a table of
// entries.
#pragma once

#include "kernels/common/args.h"
#include "kernels/common/budget.h"
#include "kernels/common/visible_range.h"
#include "kernels/common/visual_spans.h"

namespace visionpulse::cpu {

constexpr int kBlock = 32;   // keys of a stream that are worked on together: K and V stay in L1
constexpr int kGather = 64;  // kept keys together: scattered rows take longer to come
constexpr int kLanes = 16;   // logits of one tile: kLanes / heads keys of 1, 2 or 4 heads
constexpr int kScoreChunk = 1024;  // keys of one score task

// The keys one phase runs over, in order, and how they are cut into parts.
struct Cut {
  const int32_t* kept;  // [keys] ascending positions; nullptr: begin, begin + 1, ...
  int32_t begin;        // first position
  int32_t keys;
  int32_t split, splits;  // keys of a part, parts of each KV head
  int32_t first;          // parts of the rows before, over all KV heads
};

struct Row {
  Range visible;
  int32_t n_visual;  // visual tokens among the visible keys
  int32_t padded;    // visible keys rounded up to whole blocks
  float* logits;     // [G, padded / tile rows, head tiles, kLanes] in powers of two
  float* scores;     // the score of position n is scores[n - scores_begin]
  int32_t scores_begin;
  int32_t* kept;     // room for text and selected positions
  uint32_t* keys;    // [n_visual] ordered keys of the candidates
  uint32_t* digits;  // [n_visual + kLanes] the keys that share the pivot's leading bits
};

struct Call {
  const void* q;  // [B, H, D]
  HeadStrides q_stride;
  CacheArgs cache;
  VisualArgs visual;
  SelectionArgs selection;
  ScoreArgs score;
  DType dtype;
  int32_t B, H, G, D;

  void* out;  // [B, H, D]; nullptr: none wanted
  HeadStrides out_stride;
  float* mass;       // [B]
  float* mass_mean;  // [B]
  int32_t* indices;  // [B, K_max]
  int32_t* counts;   // [B]

  const Row* rows;   // [B]
  const Cut* cuts;   // [B] of the phase that runs
  bool keep_logits;  // store logits of every visible key, or of the blocks that hold a visual token
  bool all_logits;
  bool with_values;  // accumulate V in the pass over K
  bool fill_scores;  // -inf where there is no candidate, up to N

  float* parts;  // [parts, part_floats]
  int64_t part_floats;
  float*
      head_max;  // [B, G, head tiles, kLanes] final maximum of each head, repeated over the lanes
  float* head_weight;  // [B, G, head tiles, kLanes] 1 / (sum * H) of the softmax that ranks
};

// Lanes of a head tile, and tiles of a group: 1 and 2 heads fill a tile with more keys instead.
VP_HD int32_t tile_heads(int32_t group) { return group == 1 ? 1 : group == 2 ? 2 : 4; }
VP_HD int32_t head_tiles(int32_t group) { return group <= 2 ? 1 : (group + 3) / 4; }
VP_HD int32_t padded_heads(int32_t group) { return head_tiles(group) * tile_heads(group); }

// Bytes between two parts are unshared cache lines: `unit` is the columns one value step covers.
VP_HD int32_t padded_dim(int32_t dim, int32_t unit) { return (dim + unit - 1) / unit * unit; }

struct Kernels {
  const char* name;
  int32_t unit;
  // One part of one KV head: logits, statistics and, if wanted, values.
  void (*stream[3])(const Call&, int32_t row, int32_t kv_head, int32_t part);
  // The same over kept logits: V of text and selected keys.
  void (*weigh[3])(const Call&, int32_t row, int32_t kv_head, int32_t part);
  // Parts of one KV head made one, in order, and written to out.
  void (*finish[3])(const Call&, int32_t row, int32_t kv_head);
  // Statistics of all heads of a row: masses, and what the scores need.
  void (*statistics)(const Call&, int32_t row);
  // Scores of the visible keys [begin + chunk * kScoreChunk, ...) of a row.
  void (*score)(const Call&, int32_t row, int32_t chunk);
  // Budget and top-K of one row.
  void (*choose)(const Call&, int32_t row);
  // Sums the words of a buffer, as fast as they can be read: the ceiling that benchmarks compare
  // with.
  uint64_t (*read)(const void* bytes, int64_t count);
};

extern const Kernels kBaseline, kAvx2, kAvx512, kAvx512Bf16, kNeon;

}  // namespace visionpulse::cpu
