// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/macros.h"

namespace visionpulse {

struct Range {
  int32_t begin, end;
};

// The visible keys of a row: [start, length) cut to the window, never outside the cache.
VP_HD Range visible_range(int32_t start, int32_t length, int32_t capacity, int32_t window) {
  Range keys;
  keys.end = length < 0 ? 0 : length > capacity ? capacity : length;
  keys.begin = start < 0 ? 0 : start;
  if (window > 0 && keys.end - window > keys.begin) keys.begin = keys.end - window;
  if (keys.begin > keys.end) keys.begin = keys.end;
  return keys;
}

}  // namespace visionpulse
