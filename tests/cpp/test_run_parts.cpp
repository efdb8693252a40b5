// SPDX-License-Identifier: Apache-2.0
// Parts and merges of a call: each once, and no KV head is made one before its last part.
#include <algorithm>
#include <atomic>
#include <vector>

#include "csrc/cpu/run_parts.h"
#include "tests/cpp/check.h"

using namespace visionpulse::cpu;

namespace {

constexpr int kHeads = 8;  // KV heads

// What ran, by row and KV head.
std::vector<std::atomic<int>> parts_run, merges_run;
std::atomic<int> merged_early;

void run_part(const Call& c, int32_t row, int32_t head, int32_t, Run run) {
  for (int h = 0; h < run.heads; ++h) ++parts_run[row * c.G + head + h];
}
void merge(const Call& c, int row, int head) {
  if (parts_run[row * c.G + head] != c.cuts[row].n_parts) ++merged_early;
  ++merges_run[row * c.G + head];
}
void around(const Call&, void (*run)(void*), void* context) { run(context); }

void each_part_and_merge_runs_once(const std::vector<int>& parts_of_rows, int threads, int heads) {
  std::vector<Cut> cuts;
  int parts = 0;
  for (int n : parts_of_rows) {
    cuts.push_back({nullptr, 0, n * 16, 16, n, parts});
    parts += n * kHeads;
  }
  Call c = {};
  c.B = static_cast<int>(cuts.size());
  c.G = c.H = kHeads;
  c.queries.count = 1;
  c.cuts = cuts.data();
  parts_run = std::vector<std::atomic<int>>(c.B * c.G);
  merges_run = std::vector<std::atomic<int>>(c.B * c.G);
  merged_early = 0;
  run_parts(c, parts, threads, heads, {around, run_part, merge});
  for (int i = 0; i < c.B * c.G; ++i) {
    CHECK_THAT(parts_run[i] == cuts[i / c.G].n_parts && merges_run[i] == 1,
               "row and head %d of %d threads, %d together: %d parts, %d merges", i, threads, heads,
               parts_run[i].load(), merges_run[i].load());
  }
  CHECK(merged_early == 0);
}

void one_thread_merges_each_head_behind_its_last_part() {
  const Cut first = {nullptr, 0, 80, 16, 5, 0}, second = {nullptr, 0, 48, 16, 3, 40};
  const Turns alone = turns_of(64, 1, 1), shared = turns_of(64, 2, 1);
  CHECK(alone.length == 64 && shared.length == 4);
  CHECK(alone.has_whole(first, 35) && alone.has_whole(second, 61));
  CHECK(!shared.has_whole(first, 0));
  CHECK(shared.has_whole(second, 40) && !shared.has_whole(second, 43));
  CHECK(!alone.has_whole({nullptr, 0, 0, 0, 0, 64}, 64));
}

void without_a_merge_none_runs() {
  const Cut cut = {nullptr, 0, 32, 16, 2, 0};
  Call c = {};
  c.B = 1;
  c.G = c.H = kHeads;
  c.queries.count = 1;
  c.cuts = &cut;
  parts_run = std::vector<std::atomic<int>>(kHeads);
  run_parts(c, 2 * kHeads, 2, 1, {around, run_part, nullptr});
  for (const auto& n : parts_run) CHECK(n == 2);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 5})
    for (int heads : {1, 2, 8})
      for (const std::vector<int>& parts :
           {std::vector<int>{1}, {17}, {0, 3, 0, 1}, {4, 4, 4, 4, 4, 4, 4, 4}, {0}, {200, 1}})
        each_part_and_merge_runs_once(parts, threads, heads);
  one_thread_merges_each_head_behind_its_last_part();
  without_a_merge_none_runs();
  return check::report("run_parts");
}
