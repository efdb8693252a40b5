// SPDX-License-Identifier: Apache-2.0
// Copies that were asked for and have not landed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cusim {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread;

// A barrier of shared memory that counts the bytes of bulk copies.
struct CopyBarrierState {
  uint32_t phase = 0;
  bool arrived = false;
  int64_t due = 0;         // announced bytes less those that have landed
  std::vector<Copy> late;  // under way
  std::vector<Thread*> waiting;
};

}  // namespace cusim
