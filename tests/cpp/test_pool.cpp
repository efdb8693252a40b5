// SPDX-License-Identifier: Apache-2.0
// The task pool: each task once, several callers at once, a fork, and exit with sleeping workers.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "csrc/cpu/pool.h"
#include "tests/cpp/check.h"

using visionpulse::cpu::node_cuts;
using visionpulse::cpu::parallel;
using visionpulse::cpu::Place;
using visionpulse::cpu::set_places;

namespace {

void each_task_runs_once() {
  for (int threads : {1, 2, 3, 8})
    for (int tasks : {0, 1, 2, 7, 1000}) {
      std::vector<int> ran(tasks);
      parallel(tasks, threads, [&](int task) { ++ran[task]; });
      int wrong = 0;
      for (int times : ran) wrong += times != 1;
      CHECK_THAT(wrong == 0, "threads=%d tasks=%d", threads, tasks);
    }
}

void results_are_seen_by_the_caller() {
  for (int round = 0; round < 2000; ++round) {
    int values[16] = {};
    parallel(16, 4, [&](int task) { values[task] = round + task; });
    int wrong = 0;
    for (int i = 0; i < 16; ++i) wrong += values[i] != round + i;
    CHECK(wrong == 0);
  }
}

void callers_do_not_wait_for_each_other() {
  std::atomic<int> total{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < 300; ++round)
        parallel(20, 3, [&](int) { total.fetch_add(1, std::memory_order_relaxed); });
    });
  for (std::thread& caller : callers) caller.join();
  CHECK_THAT(total == 4 * 300 * 20, "total=%d", total.load());
}

// Two nodes that share the machine's first core: the tasks are as if there were two.
void tasks_are_cut_for_nodes_where_their_units_begin() {
  const auto tens = [](void*, int task) { return task / 10 * 10; };
  CHECK((node_cuts(100, {1, 1}, tens, nullptr) == std::vector<int>{0, 50, 100}));
  CHECK((node_cuts(30, {1, 1}, tens, nullptr) == std::vector<int>{0, 10, 30}));
  CHECK((node_cuts(100, {3, 1}, tens, nullptr) == std::vector<int>{0, 70, 100}));
  CHECK((node_cuts(7, {1, 1, 2}, tens, nullptr) == std::vector<int>{0, 0, 0, 7}));
  CHECK((node_cuts(100, {0, 1}, tens, nullptr) == std::vector<int>{0, 0, 100}));
  set_places({{0, {0}}, {1, {0}}});
  each_task_runs_once();
  results_are_seen_by_the_caller();
  set_places({});
}

// ThreadSanitizer refuses new threads in the child of a threaded parent.
#if !defined(__SANITIZE_THREAD__)
void a_child_makes_a_new_pool() {
  parallel(8, 4, [](int) {});
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> ran{0};
    for (int round = 0; round < 50; ++round) parallel(10, 4, [&](int) { ++ran; });
    _exit(ran == 500 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

}  // namespace

int main() {
  each_task_runs_once();
  results_are_seen_by_the_caller();
  callers_do_not_wait_for_each_other();
  tasks_are_cut_for_nodes_where_their_units_begin();
#if !defined(__SANITIZE_THREAD__)
  // qemu's user mode dies in the child of a threaded parent
  if (std::getenv("VP_UNDER_QEMU") == nullptr) a_child_makes_a_new_pool();
#endif
  return check::report("pool");
}
