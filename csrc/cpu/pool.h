// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

namespace visionpulse::cpu {

// Runs body(context, 0 .. tasks - 1) on the caller and up to threads - 1 workers.
//
// At the end the caller waits only for tasks that a worker has taken. A worker that the system did
// not schedule costs nothing, where a barrier would cost a slice of the scheduler. Safe from
// several threads at once, and after fork.
void run_tasks(int tasks, int threads, void (*body)(void*, int), void* context);

template <class F>
void parallel(int tasks, int threads, F&& f) {
  using Body = std::remove_reference_t<F>;
  run_tasks(
      tasks, threads, [](void* context, int task) { (*static_cast<Body*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace visionpulse::cpu
