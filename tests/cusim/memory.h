// SPDX-License-Identifier: Apache-2.0
// Memory that is not plain: shared memory of a neighbour, and copies that land when they please.
#pragma once

#include "cusim.h"

namespace cusim {

// Shared memory of another block of the cluster, at the place of `local` in one's own.
template <class Pointer>
Pointer remote(Pointer local, unsigned rank, Place place) {
  Block& target = machine.cluster.at(rank);
  if (machine.cluster_barriers == 0) {
    fail("shared memory of a block that may not have started: no cluster barrier yet", place);
  }
  if (target.live != target.threads.size()) fail("shared memory of a block that left", place);
  const auto offset = reinterpret_cast<const char*>(local) - machine.current->block->shared;
  return reinterpret_cast<Pointer>(target.shared + offset);
}

// Bytes that asynchronous copies have read from global memory.
inline uint64_t bytes_read = 0;

inline void async_copy(void* to, const void* from, size_t bytes, size_t valid, Place place) {
  if (reinterpret_cast<uintptr_t>(to) % bytes) fail("cp.async: misaligned shared address", place);
  if (valid && reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("cp.async: misaligned global address", place);
  }
  bytes_read += valid;
  Thread& me = *machine.current;
  static const char zeros[16] = {};
  auto add = [&](void* where, const void* what, size_t count) {
    if (count == 0) return;
    if (settings.early) {
      memcpy(where, what, count);
    } else {
      me.open.push_back({where, what, count});
    }
  };
  add(to, from, valid);
  add(static_cast<char*>(to) + valid, zeros, bytes - valid);
}

inline void async_commit() {
  Thread& me = *machine.current;
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

inline void async_wait(size_t keep) {
  auto& groups = machine.current->groups;
  while (groups.size() > keep) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

}  // namespace cusim
