// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the host: every thread is a fiber, every block (or cluster of blocks) is
// resident by itself. Hardware is only unlucky, this is hostile: threads and blocks run in an order
// drawn from a seed, shared memory starts as NaN, asynchronous copies land at the first or at the
// last moment the program allows, and a barrier or warp operation that not everybody named reaches
// is an error with file and line. An exception leaves the launch; the process goes on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

#include "copies.h"
#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cusim {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return line == other.line && file == other.file; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
  // As a default argument: where the function that has it is called.
  static Place current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

#define CUSIM_HERE ::cusim::Place::current()

constexpr int kPayload = 48;  // bytes a lane can hand to its warp at once

inline bool same_text(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

// One meeting of the lanes of a mask. Two sets of slots: a lane may still read the last meeting's
// while a faster one writes the next's, but never the one after.
struct Meeting {
  uint32_t mask = 0, here = 0;
  unsigned turn = 0;
  const char* what = "";
  Place place{};
  alignas(16) char slot[2][32][kPayload];
};

struct Block;

struct Thread {
  Context context;
  uint3 index{};
  unsigned linear = 0;
  Block* block = nullptr;
  bool done = false;
  const char* waits = nullptr;  // what for; nullptr: can run
  Place place{};
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  bool fenced = false;    // for the copy engine
  bool released = false;  // fenced since its last barrier of the block
  Place barrier{};        // the last one of the block
  bool stale = false;     // has counted its block, and not fenced since
};

// A barrier of some threads of a block, by its number.
struct NamedBarrier {
  size_t threads = 0;
  std::vector<Thread*> here;
  Place place{};
};

struct Block {
  uint3 index{};
  unsigned rank = 0;  // in its cluster
  std::vector<Thread*> threads;
  std::vector<std::vector<std::unique_ptr<Meeting>>> warps;
  std::unique_ptr<char[]> memory;  // exactly what was asked for, so that ASan sees its ends
  char* shared = nullptr;
  size_t at_barrier = 0, live = 0;
  Place barrier{};
  NamedBarrier named[16];
  std::map<void*, CopyBarrierState> copy_barriers;
};

// What the kernels of this module were compiled for, as __CUDA_ARCH__ says; 0: for whatever GPU is
// plugged in, with all that it has.
inline int compiled_for = 0;
inline int code_of(int capability) { return compiled_for ? compiled_for : capability; }

struct Settings {
  unsigned seed = 1;
  bool early = false;  // when asynchronous copies land
  bool shuffle = true;
};
inline Settings settings;

struct Machine {
  Stacks stacks;
  std::vector<Thread> threads;
  std::vector<Block> cluster;
  std::vector<Thread*> ready;
  Context scheduler;
  Thread* current = nullptr;
  dim3 grid, block;
  std::mt19937 random;
  std::function<void()> body;
  std::string error;
  size_t at_cluster = 0, live = 0, cluster_barriers = 0;
  Place cluster_barrier{};
};
inline Machine machine;

[[noreturn]] inline void fail(const std::string& what, Place place) {
  const Thread& me = *machine.current;
  const uint3 b = me.block->index;
  throw Error(what + " at " + place.text() + ", block (" + std::to_string(b.x) + ", " +
              std::to_string(b.y) + ", " + std::to_string(b.z) + ") thread " +
              std::to_string(me.linear));
}

inline void wake(Thread* thread) {
  thread->waits = nullptr;
  machine.ready.push_back(thread);
}

inline void sleep(const char* what, Place place) {
  Thread* me = machine.current;
  me->waits = what;
  me->place = place;
  switch_to(me->context, machine.scheduler, false);
  if (!machine.error.empty()) throw Error(machine.error);
}

// What is wrong with a block that ends now.
inline std::string left_under_way(const Block& block) {
  for (const auto& [at, barrier] : block.copy_barriers) {
    if (!barrier.late.empty()) return "the block left while bulk copies were under way";
  }
  return "";
}

inline void run_thread() {
  arrived(machine.scheduler);
  try {
    machine.body();
  } catch (const std::exception& error) {
    if (machine.error.empty()) machine.error = error.what();
  }
  Thread* me = machine.current;
  me->done = true;
  if (--me->block->live == 0 && machine.error.empty()) machine.error = left_under_way(*me->block);
  --machine.live;
  switch_to(me->context, machine.scheduler, true);
  abort();
}

// The lanes of a warp together, the warps in any order: the last one may run far ahead.
inline void wake_warps(const std::vector<Thread*>& threads) {
  std::vector<size_t> firsts;
  for (size_t i = 0; i < threads.size(); i += 32) firsts.push_back(i);
  if (settings.shuffle) std::shuffle(firsts.begin(), firsts.end(), machine.random);
  for (const size_t first : firsts) {
    for (size_t i = first; i < std::min(first + 32, threads.size()); ++i) {
      if (threads[i] != machine.current) wake(threads[i]);
    }
  }
}

inline uint32_t lanes_that_exist(const Thread& me) {
  const size_t count = me.block->threads.size() - (me.linear & ~31u);
  return count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

inline Meeting& meeting_of(uint32_t mask, const char* what, Place place) {
  auto& meetings = machine.current->block->warps[machine.current->linear / 32];
  Meeting* mine = nullptr;
  for (auto& meeting : meetings) {
    if (meeting->mask == mask) mine = meeting.get();
    if (meeting->mask != mask && (meeting->here & mask)) {
      fail(std::string(what) + ": lanes of one warp came with masks that overlap", place);
    }
  }
  if (mine == nullptr) {
    meetings.push_back(std::make_unique<Meeting>());
    mine = meetings.back().get();
    mine->mask = mask;
  }
  return *mine;
}

// Hands `value` to the lanes of `mask`, waits for theirs, and gives all 32 slots.
template <class T>
const char (*exchange(uint32_t mask, const T& value, const char* what, Place place)) [kPayload] {
  static_assert(sizeof(T) <= kPayload);
  Thread& me = *machine.current;
  const unsigned lane = me.linear & 31;
  if (!(mask >> lane & 1)) fail(std::string(what) + ": the lane is not in its own mask", place);
  mask &= lanes_that_exist(me);
  Meeting& meeting = meeting_of(mask, what, place);
  if (meeting.here && !(meeting.place == place && same_text(meeting.what, what))) {
    fail(std::string("lanes of one warp at different operations, ") + meeting.what + " at " +
             meeting.place.text() + " and " + what,
         place);
  }
  meeting.what = what;
  meeting.place = place;
  const unsigned turn = meeting.turn & 1;
  memcpy(meeting.slot[turn][lane], &value, sizeof(T));
  meeting.here |= 1u << lane;
  if (meeting.here != mask) {
    sleep(what, place);
  } else {
    meeting.here = 0;
    ++meeting.turn;
    Thread* const* warp = &me.block->threads[me.linear & ~31u];
    for (unsigned other = 0; other < 32; ++other) {
      if ((mask >> other & 1) && other != lane) wake(warp[other]);
    }
  }
  return meeting.slot[turn];
}

template <class T>
T slot_value(const char (*slots)[kPayload], unsigned lane) {
  T value;
  memcpy(&value, slots[lane], sizeof(T));
  return value;
}

template <class T>
T shuffle(uint32_t mask, T value, unsigned source, const char* what, Place place) {
  const auto* slots = exchange(mask, value, what, place);
  if (!(mask >> source & 1))
    fail(std::string(what) + ": the source lane is not in the mask", place);
  return slot_value<T>(slots, source);
}

inline void report_deadlock() {
  std::string text = "deadlock:";
  int shown = 0;
  for (const Thread& thread : machine.threads) {
    if (thread.done || shown++ >= 4) continue;
    text += " thread " + std::to_string(thread.linear) + " waits for " + thread.waits + " at " +
            thread.place.text() + ";";
  }
  machine.error = text;
}

inline void run_resident() {
  auto& ready = machine.ready;
  if (settings.shuffle) std::shuffle(ready.begin(), ready.end(), machine.random);
  // Two adversaries: all threads at once in any order, or one warp as far ahead as it gets.
  const bool any_order = settings.shuffle && machine.random() % 2 == 0;
  while (machine.live > 0) {
    if (ready.empty()) {
      if (machine.error.empty()) report_deadlock();
      for (Thread& thread :
           machine.threads) {  // each leaves by an exception, its objects destroyed
        if (!thread.done) ready.push_back(&thread);
      }
    }
    if (any_order) std::swap(ready[machine.random() % ready.size()], ready.back());
    Thread* next = ready.back();
    ready.pop_back();
    if (next->done) continue;
    machine.current = next;
    switch_to(machine.scheduler, next->context, false);
  }
  ready.clear();
}

inline void place_block(Block& block, uint3 index, unsigned rank, size_t shared_bytes) {
  block = Block{};
  block.index = index;
  block.rank = rank;
  // 128 bytes for the alignment that a kernel may count on
  block.memory.reset(new char[shared_bytes + 128]);
  const auto start = reinterpret_cast<uintptr_t>(block.memory.get());
  block.shared = block.memory.get() + (128 - start % 128) % 128;
  memset(block.memory.get(), 0xff, shared_bytes + 128);
#if defined(__SANITIZE_ADDRESS__)
  const char* end = block.shared + shared_bytes;
  __asan_poison_memory_region(end, block.memory.get() + shared_bytes + 128 - end);
#endif
}

// Runs `body` as a kernel: clusters of `cluster` blocks along x are resident together.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster,
                   std::function<void()> body) {
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  if (threads > 1024) throw Error("a block has at most 1024 threads");
  if (shared_bytes > (227u << 10)) throw Error("a block has at most 227 KiB of shared memory");
  if (grid.x % cluster) throw Error("the grid is no multiple of the cluster");
  machine.grid = grid;
  machine.block = block;
  machine.body = std::move(body);
  machine.error.clear();
  machine.random.seed(settings.seed);
  std::vector<size_t> order(blocks / cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i * cluster;
  if (settings.shuffle) std::shuffle(order.begin(), order.end(), machine.random);
  for (const size_t first : order) {
    machine.threads.clear();
    machine.threads.resize(threads * cluster);
    machine.cluster.resize(cluster);
    machine.at_cluster = machine.cluster_barriers = 0;
    machine.live = threads * cluster;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      const auto id = static_cast<unsigned>(first + rank);
      Block& home = machine.cluster[rank];
      place_block(home, {id % grid.x, id / grid.x % grid.y, id / grid.x / grid.y}, rank,
                  shared_bytes);
      home.live = threads;
      home.warps.resize((threads + 31) / 32);
      for (unsigned t = 0; t < threads; ++t) {
        Thread& thread = machine.threads[rank * threads + t];
        thread.linear = t;
        thread.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
        thread.block = &home;
        home.threads.push_back(&thread);
        prepare(thread.context, machine.stacks.at(rank * threads + t), &run_thread);
        machine.ready.push_back(&thread);
      }
    }
    run_resident();
    if (!machine.error.empty()) throw Error(machine.error);
  }
}

}  // namespace cusim

#include "barriers.h"
#include "memory.h"
