// SPDX-License-Identifier: Apache-2.0
// The ranges that a profiler would see, in order.
#pragma once

#include <string>
#include <vector>

namespace cusim {

inline std::vector<std::string> ranges;

}  // namespace cusim

inline int nvtxRangePushA(const char* name) {
  cusim::ranges.push_back(name);
  return 0;
}
inline int nvtxRangePop() { return 0; }
