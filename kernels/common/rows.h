// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/args.h"

namespace visionpulse {

constexpr int32_t kNoSpan = 2147483647;

struct Range {
  int32_t begin, end;
};

// The visible keys of a row, never outside the cache: [start, length) cut to the window.
VP_HD Range visible_range(int32_t start, int32_t length, int32_t capacity, int32_t window) {
  Range keys;
  keys.end = length < 0 ? 0 : length > capacity ? capacity : length;
  keys.begin = start < 0 ? 0 : start;
  if (window > 0 && keys.end - window > keys.begin) keys.begin = keys.end - window;
  if (keys.begin > keys.end) keys.begin = keys.end;
  return keys;
}

// The first run of a row that ends after `position`; S when there is none.
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

// Visual tokens of a row in front of `position`: the compact index of a token that stands there.
VP_HD int32_t visual_before(const int32_t* spans /* [S, 2] */, const int32_t* offsets /* [S + 1] */,
                            int32_t count, int32_t position) {
  const int32_t s = span_after(spans, count, position);
  if (s == count) return offsets[count];
  const int32_t begin = spans[2 * s];
  return offsets[s] + (position > begin ? position - begin : 0);
}

}  // namespace visionpulse
