// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>
#include <vector>

namespace visionpulse::cpu {

// Where a worker runs.
struct Place {
  int node;  // memory node: 0, 1, ...
  std::vector<int> cores;
};

// From the next call on worker i runs at places[i % places.size()]; without places, where the
// thread that made it may. Tasks go to the nodes in proportion to the threads there.
void set_places(std::vector<Place> places);

// The tasks [0, tasks) cut for the nodes, given the threads on each: begins[n] .. begins[n + 1] are
// those of node n. `whole` moves a cut to where a unit of tasks begins that one node should keep.
using Whole = int (*)(void* context, int task);
std::vector<int> node_cuts(int tasks, const std::vector<int>& threads, Whole whole, void* context);

// Runs body(context, 0 .. tasks - 1) on the caller and up to threads - 1 workers.
//
// At the end the caller waits only for tasks that a worker has taken. A worker that the system did
// not schedule costs nothing, where a barrier would cost a slice of the scheduler. Safe from
// several threads at once, and after fork. A thread takes tasks of its own node first.
void run_tasks(int tasks, int threads, void (*body)(void*, int), Whole whole, void* context);

template <class F, class W>
void parallel(int tasks, int threads, F&& f, W&& whole) {
  struct Both {
    std::remove_reference_t<F>* f;
    std::remove_reference_t<W>* whole;
  } both = {&f, &whole};
  run_tasks(
      tasks, threads, [](void* context, int task) { (*static_cast<Both*>(context)->f)(task); },
      [](void* context, int task) { return (*static_cast<Both*>(context)->whole)(task); }, &both);
}

template <class F>
void parallel(int tasks, int threads, F&& f) {
  parallel(tasks, threads, f, [](int task) { return task; });
}

}  // namespace visionpulse::cpu
