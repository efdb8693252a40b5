// SPDX-License-Identifier: Apache-2.0
// Searches in the visual spans of one row.
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

constexpr int32_t kNoSpan = 2147483647;  // begin and end of the unused spans past the last

// The first span that ends after `position`; S if there is none.
VP_HD int32_t span_after(const int32_t* spans /* [S, 2] */, int32_t count, int32_t position) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t mid = (low + high) / 2;
    if (spans[2 * mid + 1] > position) {
      high = mid;
    } else {
      low = mid + 1;
    }
  }
  return low;
}

// The visual tokens of a row before `position`: for a visual token at `position`, its visual index.
VP_HD int32_t visual_before(const int32_t* spans /* [S, 2] */, const int32_t* offsets /* [S + 1] */,
                            int32_t count, int32_t position) {
  const int32_t s = span_after(spans, count, position);
  if (s == count) return offsets[count];
  const int32_t begin = spans[2 * s];
  return offsets[s] + (position > begin ? position - begin : 0);
}

}  // namespace visionpulse
