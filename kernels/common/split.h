// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

struct SplitRule {
  int32_t wanted;    // parts of a row, over all KV heads, that keep the machine busy
  int32_t shortest;  // keys that pay for a part's set-up and merge
  int32_t longest;   // keys after which one more part costs nothing that shows
  int32_t tile;      // parts are whole tiles
};

// Keys in one part of a row. A row is cut by its own key count alone: batch, capacity and page size
// are left out on purpose, because a row's bits must not change with its neighbours.
VP_HD int32_t split_length(const SplitRule& rule, int32_t keys, int32_t kv_heads) {
  const int64_t even = (static_cast<int64_t>(keys) * kv_heads + rule.wanted - 1) / rule.wanted;
  const int64_t low = even < rule.shortest ? rule.shortest : even;
  const int64_t cut = low > rule.longest ? rule.longest : low;
  return static_cast<int32_t>((cut + rule.tile - 1) / rule.tile * rule.tile);
}

VP_HD int32_t split_count(int32_t keys, int32_t length) { return (keys + length - 1) / length; }

}  // namespace visionpulse
