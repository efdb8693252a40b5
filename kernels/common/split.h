// SPDX-License-Identifier: Apache-2.0
// How the keys of a row are cut into parts.
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

struct SplitRule {
  int32_t target_parts;  // of a row, over all KV heads: enough to keep the machine busy
  int32_t shortest;      // keys that pay for a part's set-up and merge
  int32_t longest;       // keys above which the cost of another part no longer shows
  int32_t tile;          // a part is whole tiles of this many keys
};

// Keys in one part of a row. They depend on the row's own key count alone, not on batch, capacity
// or page size, because a row's bits must not change with its neighbours.
VP_HD int32_t split_length(const SplitRule& rule, int32_t keys, int32_t kv_heads) {
  const int64_t even =
      (static_cast<int64_t>(keys) * kv_heads + rule.target_parts - 1) / rule.target_parts;
  const int64_t low = even < rule.shortest ? rule.shortest : even;
  const int64_t cut = low > rule.longest ? rule.longest : low;
  return static_cast<int32_t>((cut + rule.tile - 1) / rule.tile * rule.tile);
}

VP_HD int32_t split_count(int32_t keys, int32_t length) { return (keys + length - 1) / length; }

}  // namespace visionpulse
