// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace visionpulse::cpu {
namespace {

// About 20 us: longer than the pause between two phases of a call, far shorter than a slice of the
// scheduler.
constexpr int kSpins = 2000;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  void (*body)(void*, int);
  void* context;
  int tasks;
  std::atomic<int> seats;  // workers that may still join
  std::atomic<int> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  // A worker that comes after the caller has left finds no task, and touches nothing but `next`.
  void work(bool caller) {
    for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(context, task);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks && !caller) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_one();
      }
    }
  }

  bool complete() const { return done.load(std::memory_order_acquire) == tasks; }

  void wait() {
    for (int i = 0; i < kSpins; ++i) {
      if (complete()) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return complete(); });
  }
};

class Pool {
 public:
  void run(const std::shared_ptr<Job>& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      job_ = job;
      turn_.fetch_add(1, std::memory_order_release);
    }
    if (helpers >= workers_) {
      wake_.notify_all();
    } else {
      for (int i = 0; i < helpers; ++i) wake_.notify_one();
    }
    job->work(true);
    job->wait();
  }

 private:
  void grow(int helpers) {
    try {
      for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // the system has no more threads: those that there are, and the caller, do the work
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && turn_.load(std::memory_order_acquire) == seen; ++i) relax();
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return turn_.load(std::memory_order_relaxed) != seen; });
        seen = turn_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (job->seats.fetch_sub(1, std::memory_order_relaxed) > 0) job->work(false);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;  // the newest; callers finish older jobs by themselves
  std::atomic<uint64_t> turn_{0};
  std::atomic<int> workers_{0};
};

// Never destroyed: its workers sleep until the process ends, and need its mutex until then.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  Pool* current = the_pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  static std::once_flag registered;
  // a child has none of its parent's workers, and perhaps a locked mutex: it makes a new pool
  std::call_once(registered, [] {
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_release); });
  });
  Pool* made = new Pool;
  if (the_pool.compare_exchange_strong(current, made)) return *made;
  delete made;
  return *current;
}

}  // namespace

void run_tasks(int tasks, int threads, void (*body)(void*, int), void* context) {
  const int helpers = std::min(threads, tasks) - 1;
  if (helpers < 1) {
    for (int task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  auto job = std::make_shared<Job>();
  job->body = body;
  job->context = context;
  job->tasks = tasks;
  job->seats.store(helpers, std::memory_order_relaxed);
  pool().run(job, helpers);
}

}  // namespace visionpulse::cpu
