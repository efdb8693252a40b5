// SPDX-License-Identifier: Apache-2.0
// How work is divided on a GPU: pure functions of host numbers, so they are tested without one.
#pragma once

#include <cstdint>

#include "kernels/cuda/args.h"

namespace visionpulse::cuda {

// What a plan needs to know of a GPU.
struct Chip {
  int32_t capability;  // 90 for compute capability 9.0
  // The architecture that the loaded kernels were compiled for: below `capability` where an older
  // build runs through its PTX. What needs code, and not the device alone, goes by it.
  int32_t code;
  int32_t multiprocessors;
  int32_t shared_bytes;  // that one block may ask for
  bool clusters() const { return code >= 90; }
  bool dependent_launch() const { return code >= 90; }
  bool bulk_copies() const { return code >= 90; }
};

// How tiles reach shared memory; kAuto leaves it to the plan.
enum class Copies : int32_t { kAuto, kAsync, kBulk };

struct Shape {
  Kind kind;
  int32_t rows, heads, kv_heads, head_dim;
  int32_t capacity;     // keys that a row can have
  int32_t queries = 1;  // of a row, which share its keys
};

enum class Stage { kScore, kAttend };

// What a block streams.
struct Streams {
  bool keys;    // K; else the stored logits
  bool values;  // V
  bool listed;  // of text and a list, else of all keys
};

struct StreamPlan {
  const StreamKernel* kernel;
  int32_t warps, stages;
  int32_t team;              // warps that share a tile
  int32_t head_blocks;       // blocks that the query heads of a KV head are spread over
  int32_t k_bytes, v_bytes;  // of one stage of one team
  int32_t shared_bytes;
  SplitRule rule;
  MergeRule merge;
  int32_t max_splits;
  int64_t part_stats, part_out;  // floats of scratch memory; 0 where no row is ever split
};

// The kernel of a stage; throws where there is none.
const StreamKernel& kernel_of(Stage stage, const Shape& shape);

StreamPlan plan_stream(Stage stage, const Chip& chip, const Shape& shape, Streams streams);

struct SelectPlan {
  bool cluster;
  int32_t blocks;  // of a row
  int32_t cached;  // candidates that a block has shared memory for: sort code and position
  int32_t shared_bytes;
  int64_t codes_stride;  // scratch words of a row, twice; 0: all fits into shared memory
  int64_t histograms;    // scratch words of a row; 0: the blocks hand nothing over
};

// `candidates`: the most visual tokens that a row can have.
SelectPlan plan_select(const Chip& chip, int32_t candidates);

// Whether whole tiles come by bulk copies.
bool bulk_copies(const Chip& chip, Copies requested);

}  // namespace visionpulse::cuda
