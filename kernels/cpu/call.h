// SPDX-License-Identifier: Apache-2.0
// The records that the host passes to the kernels, and the table of one instruction set's kernels.
#pragma once

#include "kernels/common/args.h"
#include "kernels/common/visible_range.h"

namespace visionpulse::cpu {

constexpr int kBlock = 32;  // most keys of a block of scores, or of a stream that queries share
constexpr int kByteBlock = 128;  // keys of a block of a stream in 8 bits: K and V just fit L1
constexpr int kListBlock = 64;   // keys of a block of a list: scattered keys take longer to arrive
constexpr int kMostKeys = 128;   // of any block
constexpr int kLanes = 16;       // logits of a tile: kLanes / HT keys of HT = 1, 2 or 4 heads
constexpr int kScoreChunk = 1024;  // keys of one score task

// The keys that a phase runs over, and how they are cut into parts.
struct Cut {
  const int32_t* attended;  // [keys] ascending positions, a list; nullptr: begin, begin + 1, ...
  int32_t begin;            // first position
  int32_t keys;
  int32_t part_keys;   // keys of a part
  int32_t n_parts;     // parts of each KV head
  int32_t first_part;  // parts of the rows before, over all KV heads
  int32_t heads;       // KV heads with places of their own for their parts; then from the first on
};

// A part's place among the parts that one thread runs one after the other: it only steers
// prefetches.
struct Run {
  bool is_first, is_last;
  int32_t heads;  // KV heads from the part's on, whose parts of the same keys run with it
  bool in_pages;  // each of them has its keys of a page side by side; else each token its heads
};

// A query: a row of the cache, or one of its Q queries.
struct Row {
  int32_t cache_row, query;  // query: of the cache row's Q
  Range visible;
  int32_t n_visual;     // visual tokens among the visible keys
  int32_t padded_keys;  // visible keys rounded up to whole blocks
  // Times log2(e): [G, padded_keys / keys of a tile, head tiles, kLanes]. Those of a pass that the
  // queries of a row share are SharedPass::stored_logits, here from this query's heads on.
  float* stored_logits;
  int32_t first_head;  // among the heads of such a pass
  float* scores;       // the score of position n is scores[n - scores_begin]
  int32_t scores_begin;
  int32_t* attended;   // space for text and kept positions
  uint32_t* codes;     // [n_visual + kLanes] sort codes of candidates
  int32_t* positions;  // [n_visual + kLanes] theirs
};

// What the queries of a cache row share in one pass over K and V. Its heads of a KV head are those
// of every query that sees a key, query * group + head.
struct SharedPass {
  Range seen;             // all that any of them sees
  Range common;           // what each of them sees
  int32_t first;          // the first query that sees a key; those after it do too
  int32_t count, padded;  // heads of a KV head; rounded up to whole registers
  int32_t padded_keys;    // of `seen`, rounded up to whole blocks
  void* q;                // [G, padded, D], in the layout and type of the arithmetic
  float* stored_logits;   // [G, padded_keys, padded] times log2(e)
};

struct Call {
  const void* q;  // [B, H, D], or [B, Q, H, D]
  HeadStrides q_stride;
  QueriesArgs queries;
  CacheArgs cache;
  VisualArgs visual;
  SelectionArgs selection;
  ScoreArgs score;
  DType dtype;
  int32_t B, H, G, D;

  void* out;  // as q; nullptr: no output
  HeadStrides out_stride;
  float* mass;       // [B * Q]
  float* mass_mean;  // [B * Q]
  int32_t* indices;  // [B * Q, K_max]
  int32_t* counts;   // [B * Q]

  const Row* rows;           // [B * Q]
  const SharedPass* passes;  // [B] of several queries; nullptr: of one
  const Cut* cuts;           // of the phase that runs: [B * Q], or [B] where `shared`
  bool shared;               // the parts are of all queries of a cache row
  bool store_logits;         // of the blocks that hold a visual token
  bool store_all_logits;     // of the other blocks too
  bool with_values;          // the pass over K also sums V
  bool fill_scores;          // -inf where there is no candidate, up to N

  float* parts;  // [parts, part_floats]
  int64_t part_floats;
  int32_t part_heads;  // padded
  // [B, G, head tiles, kLanes], each head's number repeated over its lanes: the maximum, and
  // 1 / (sum * H) of the softmax that scores. Of several queries [B, G, heads of a shared pass].
  float* head_max;
  float* head_weight;
};

// Heads of a tile. Groups of 1 and 2 heads fill the tile with more keys instead.
VP_HD int32_t tile_heads(int32_t group) { return group == 1 ? 1 : group == 2 ? 2 : 4; }
VP_HD int32_t head_tiles(int32_t group) { return group <= 2 ? 1 : (group + 3) / 4; }
VP_HD int32_t padded_heads(int32_t group) { return head_tiles(group) * tile_heads(group); }

// D rounded up to whole value steps of `unit` columns, so two parts never share a cache line.
VP_HD int32_t padded_dim(int32_t dim, int32_t unit) { return (dim + unit - 1) / unit * unit; }

// K and V vectors that a probe reads, as a follower must: heads one after the other, keys by a
// list.
struct GatherProbe {
  const char *k, *v;
  const int32_t* positions;           // [count] ascending
  int64_t head_stride, token_stride;  // bytes
  int32_t count, heads;
  int32_t bytes;  // of a vector
  int32_t ahead;  // keys from a prefetch to its use; below 0: K and V in blocks of so many
};

// The place of a call's storage type in a table: that of the cache's DType, or the last for kFloat8
// beside q in bfloat16, which has kernels of its own where the CPU multiplies pairs of bfloat16.
VP_HD int32_t storage_of(const Call& c) {
  const bool pairs = c.cache.dtype == DType::kFloat8 && c.dtype == DType::kBFloat16;
  return static_cast<int32_t>(c.cache.dtype) + (pairs ? 1 : 0);
}
constexpr int32_t kStorages = 5;

// The kernels of one instruction set; arrays have one kernel for each storage type, those of 3 for
// each DType of the output.
struct Kernels {
  const char* name;
  int32_t unit;              // columns of a value step
  int32_t width;             // floats in a register
  bool rounds_bf16_weights;  // those of V in bfloat16 are rounded to it; else float32
  // Runs some parts of a call, on the thread that calls it, within what the CPU needs for them.
  void (*around_parts)(const Call&, void (*run)(void* context), void* context);
  // One part of one KV head, in one pass: logits, statistics and, if wanted, the sum of V.
  void (*stream[kStorages])(const Call&, int32_t row, int32_t kv_head, int32_t part, Run);
  // The same from stored logits in place of K.
  void (*weigh[kStorages])(const Call&, int32_t row, int32_t kv_head, int32_t part, Run);
  // The stream of all queries of a cache row, and before it their q in its layout.
  void (*stream_shared[kStorages])(const Call&, int32_t cache_row, int32_t kv_head, int32_t part,
                                   Run);
  void (*pack_queries[kStorages])(const Call&, int32_t cache_row, int32_t kv_head);
  // Makes the parts of one KV head one, in order, and writes the output.
  void (*merge[3])(const Call&, int32_t row, int32_t kv_head);
  void (*merge_float8[3])(const Call&, int32_t row, int32_t kv_head);  // from V of kFloat8
  // From the parts of a row to its masses, and what its scores need of each head.
  void (*statistics)(const Call&, int32_t row);
  // Scores of the visible keys [chunk * kScoreChunk, ...) of a row.
  void (*score)(const Call&, int32_t row, int32_t chunk);
  // The same of all queries of a cache row.
  void (*score_shared)(const Call&, int32_t cache_row, int32_t chunk);
  // Budget and top-K of a row.
  void (*select)(const Call&, int32_t row);
  // The fastest reads there are, of a buffer and of scattered vectors: the ceilings that benchmarks
  // compare with. `key`: head * count + index in the list.
  uint64_t (*read)(const void* bytes, int64_t count, int pages_ahead);
  uint64_t (*gather)(const GatherProbe&, int64_t first_key, int64_t end_key);
};

extern const Kernels kBaseline, kAvx2, kAvx512, kAvx512Bf16, kNeon, kNeonBf16;
const Kernels& amx_kernels();  // made from kAvx512Bf16

}  // namespace visionpulse::cpu
