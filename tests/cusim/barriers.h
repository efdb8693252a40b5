// SPDX-License-Identifier: Apache-2.0
// Where threads wait for each other, and the arrival of a block, by which no block waits.
#pragma once

#include "cusim.h"

namespace cusim {

// Counts the block of this thread among those that are done. Memory here is in order, a GPU's is
// not. So the form is checked: a barrier that ends the writes of the block, a fence that orders
// them, the count, a fence that orders the reads of the block, a barrier.
inline void arrive(Place place) {
  Thread& me = *machine.current;
  if (me.barrier.file == nullptr || !same_text(me.barrier.file, place.file)) {
    fail("no barrier of the block beside its arrival", place);
  }
  if (!me.released) fail("no fence between the barrier of the block and its arrival", place);
  me.stale = true;
}
inline void memory_fence() {
  machine.current->released = true;
  machine.current->stale = false;
}

inline void block_barrier(Place place) {
  if (machine.current->stale) fail("no fence between an arrival and the barrier", place);
  machine.current->released = false;
  machine.current->barrier = place;
  Block& block = *machine.current->block;
  if (block.live != block.threads.size()) fail("barrier after a thread of the block left", place);
  if (block.at_barrier > 0 && !(block.barrier == place)) {
    fail("threads of a block at different barriers, " + block.barrier.text() + " and here", place);
  }
  block.barrier = place;
  if (++block.at_barrier < block.threads.size()) return sleep("__syncthreads", place);
  block.at_barrier = 0;
  wake_warps(block.threads);
}

inline void named_barrier(size_t number, size_t threads, Place place) {
  NamedBarrier& barrier = machine.current->block->named[number];
  if (!barrier.here.empty() && (barrier.threads != threads || !(barrier.place == place))) {
    fail("threads of a team at different barriers, " + barrier.place.text() + " and here", place);
  }
  barrier.threads = threads;
  barrier.place = place;
  barrier.here.push_back(machine.current);
  if (barrier.here.size() < threads) return sleep("team barrier", place);
  auto here = std::move(barrier.here);
  barrier.here.clear();
  std::sort(here.begin(), here.end(), [](Thread* a, Thread* b) { return a->linear < b->linear; });
  wake_warps(here);
}

inline void cluster_barrier(Place place) {
  if (machine.live != machine.threads.size()) {
    fail("cluster barrier after a thread of the cluster left", place);
  }
  if (machine.at_cluster > 0 && !(machine.cluster_barrier == place)) {
    fail("threads of a cluster at different barriers, " + machine.cluster_barrier.text() +
             " and here",
         place);
  }
  machine.cluster_barrier = place;
  if (++machine.at_cluster < machine.threads.size()) return sleep("cluster barrier", place);
  machine.at_cluster = 0;
  ++machine.cluster_barriers;
  std::vector<Thread*> all;
  for (Thread& thread : machine.threads) all.push_back(&thread);
  wake_warps(all);
}

}  // namespace cusim
