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
inline uint64_t bulk_bytes = 0;  // of them, by bulk copies

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
  if (groups.size() > keep) machine.current->fenced = false;  // ordinary writes of this thread
  while (groups.size() > keep) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

// Bulk copies write as a device of their own: behind ordinary writes only where a fence says so.
inline void fence_copy_engine() { machine.current->fenced = true; }

inline void copy_barrier_init(void* at) {
  machine.current->block->copy_barriers[at] = {};
  machine.current->fenced = false;
}

inline CopyBarrierState& copy_barrier_at(void* at, Place place) {
  auto& copy_barriers = machine.current->block->copy_barriers;
  const auto found = copy_barriers.find(at);
  if (found == copy_barriers.end()) fail("a copy barrier that was never started", place);
  return found->second;
}

// Ends the phase once all has come; when somebody waits, it comes now at the latest.
inline void settle(CopyBarrierState& barrier, bool needed) {
  if (!barrier.arrived) return;
  if (needed) {
    for (const Copy& copy : barrier.late) {
      memcpy(copy.to, copy.from, copy.bytes);
      barrier.due -= static_cast<int64_t>(copy.bytes);
    }
    barrier.late.clear();
  }
  if (barrier.due != 0) return;
  barrier.arrived = false;
  barrier.phase ^= 1;
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

inline void copy_barrier_expect(void* at, uint32_t bytes, Place place) {
  CopyBarrierState& barrier = copy_barrier_at(at, place);
  if (barrier.arrived) fail("two arrivals in one phase of a copy barrier", place);
  barrier.arrived = true;
  barrier.due += bytes;
  settle(barrier, !barrier.waiting.empty());
}

inline void copy_barrier_wait(void* at, uint32_t phase, Place place) {
  CopyBarrierState& barrier = copy_barrier_at(at, place);
  if (barrier.phase != phase) return;
  settle(barrier, true);
  if (barrier.phase != phase) return;
  barrier.waiting.push_back(machine.current);
  sleep("bulk copies", place);
}

inline void bulk_copy(void* to, const void* from, uint32_t bytes, void* at, Place place) {
  const auto all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  if (bytes == 0 || all % 16) fail("a bulk copy that is no multiple of 16 bytes", place);
  if (!machine.current->fenced) fail("a bulk copy without a fence before it", place);
  CopyBarrierState& barrier = copy_barrier_at(at, place);
  bytes_read += bytes;
  bulk_bytes += bytes;
  if (settings.early) {
    memcpy(to, from, bytes);
    barrier.due -= bytes;
  } else {
    barrier.late.push_back({to, from, bytes});
  }
  settle(barrier, !barrier.waiting.empty());
}

}  // namespace cusim
