// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

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

constexpr int kMaxNodes = 8;  // memory nodes beyond share a range of tasks

struct Places {
  std::vector<Place> workers;  // empty: nowhere in particular
  std::vector<int> node_of;    // of each core
  int nodes = 1;
  const Places* older = nullptr;  // kept, because a worker may still read it
};

// The newest.
std::atomic<const Places*> the_places{nullptr};

const Places& places() {
  static const Places nowhere;
  const Places* current = the_places.load(std::memory_order_acquire);
  return current == nullptr ? nowhere : *current;
}

#if defined(__linux__)
int current_core() { return sched_getcpu(); }

// A core that has gone since it was checked leaves the thread where it is.
void move_to(const std::vector<int>& cores) {
  const int most = *std::max_element(cores.begin(), cores.end()) + 1;
  cpu_set_t* set = CPU_ALLOC(most);
  const size_t bytes = CPU_ALLOC_SIZE(most);
  CPU_ZERO_S(bytes, set);
  for (int core : cores) CPU_SET_S(core, bytes, set);
  sched_setaffinity(0, bytes, set);
  CPU_FREE(set);
}

std::vector<int> own_cores() {
  std::vector<int> cores;
  for (int count = 1024; count <= 1 << 16; count *= 2) {  // the kernel refuses too small a set
    cpu_set_t* set = CPU_ALLOC(count);
    const size_t bytes = CPU_ALLOC_SIZE(count);
    const bool fits = sched_getaffinity(0, bytes, set) == 0;
    for (int core = 0; fits && core < count; ++core)
      if (CPU_ISSET_S(core, bytes, set)) cores.push_back(core);
    CPU_FREE(set);
    if (fits) break;
  }
  return cores;
}

void name_thread() { pthread_setname_np(pthread_self(), "visionpulse"); }
#else
int current_core() { return -1; }
void move_to(const std::vector<int>&) {}
std::vector<int> own_cores() { return {}; }
void name_thread() {}
#endif

int node_of_core(const Places& where, int core) {
  const bool known = core >= 0 && core < static_cast<int>(where.node_of.size());
  return known ? where.node_of[core] : 0;
}

struct Job {
  // The tasks of one node.
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };

  void (*body)(void*, int);
  void* context;
  int tasks;
  int nodes = 1;
  std::atomic<int> seats;  // workers that may still join
  Share shares[kMaxNodes];
  std::atomic<int> done{0};
  std::mutex mutex;
  std::condition_variable finished;

  // A worker that comes after the caller has left finds no task, and touches nothing but `next`.
  void work(int node, bool caller) {
    for (int i = 0; i < nodes; ++i) {
      Share& share = shares[(node + i) % nodes];
      for (int task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
        body(context, task);
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks && !caller) {
          std::lock_guard<std::mutex> lock(mutex);
          finished.notify_one();
        }
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
  void run(const std::shared_ptr<Job>& job, int helpers, int node) {
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
    job->work(node, true);
    job->wait();
  }

 private:
  void grow(int helpers) {
    try {
      for (; workers_ < helpers; ++workers_)
        std::thread([this, i = workers_.load()] { serve(i); }).detach();
    } catch (const std::system_error&) {
      // the system has no more threads: those that there are, and the caller, do the work
    }
  }

  void serve(int index) {
    name_thread();
    const std::vector<int> inherited = own_cores();
    const Places* at = nullptr;
    int node = 0;
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
      if (const Places* now = the_places.load(std::memory_order_acquire); now != at) {
        at = now;
        const bool placed = !now->workers.empty();
        const Place home = placed ? now->workers[index % now->workers.size()] : Place{0, inherited};
        node = home.node;
        if (!home.cores.empty()) move_to(home.cores);
      }
      if (job->seats.fetch_sub(1, std::memory_order_relaxed) > 0) job->work(node, false);
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

void set_places(std::vector<Place> workers) {
  auto* made = new Places;
  for (Place& place : workers) {
    place.node %= kMaxNodes;
    made->nodes = std::max(made->nodes, place.node + 1);
    for (int core : place.cores) {
      if (core >= static_cast<int>(made->node_of.size())) made->node_of.resize(core + 1, 0);
      made->node_of[core] = place.node;
    }
  }
  made->workers = std::move(workers);
  made->older = the_places.load(std::memory_order_acquire);
  while (!the_places.compare_exchange_weak(made->older, made, std::memory_order_acq_rel)) {
  }
}

std::vector<int> node_cuts(int tasks, const std::vector<int>& threads, Whole whole, void* context) {
  int64_t all = 0, before = 0;
  for (int count : threads) all += count;
  std::vector<int> begins = {0};
  for (size_t node = 0; node + 1 < threads.size(); ++node) {
    before += threads[node];
    const int cut = static_cast<int>(before * tasks / all);
    begins.push_back(std::max(begins.back(), cut < tasks ? whole(context, cut) : tasks));
  }
  begins.push_back(tasks);
  return begins;
}

void run_tasks(int tasks, int threads, void (*body)(void*, int), Whole whole, void* context) {
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
  const Places& where = places();
  int node = 0;
  if (where.nodes == 1) {
    job->shares[0].end = tasks;
  } else {
    node = node_of_core(where, current_core());
    std::vector<int> counts(where.nodes, 0);
    ++counts[node];
    for (int i = 0; i < helpers; ++i) ++counts[where.workers[i % where.workers.size()].node];
    const std::vector<int> begins = node_cuts(tasks, counts, whole, context);
    job->nodes = where.nodes;
    for (int n = 0; n < where.nodes; ++n) {
      job->shares[n].next.store(begins[n], std::memory_order_relaxed);
      job->shares[n].end = begins[n + 1];
    }
  }
  pool().run(job, helpers, node);
}

}  // namespace visionpulse::cpu
