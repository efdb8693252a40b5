// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/probe.h"

#include <algorithm>
#include <atomic>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "csrc/cpu/pool.h"

namespace visionpulse::cpu {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kChunk = 1 << 20;  // bytes of a task

// read(begin, end) over [0, count), a task a `chunk`.
template <class Read>
uint64_t in_chunks(int64_t count, int64_t chunk, int threads, Read read) {
  if (threads <= 1) return read(0, count);
  std::atomic<uint64_t> bits{0};
  parallel(static_cast<int>((count + chunk - 1) / chunk), threads,
           [&](int task) { bits ^= read(task * chunk, std::min(count, (task + 1) * chunk)); });
  return bits;
}

#if defined(__x86_64__)
__attribute__((target("clflushopt"))) void flush_lines(const char* begin, const char* end) {
  for (const char* at = begin; at < end; at += kLineBytes) _mm_clflushopt(const_cast<char*>(at));
}

bool can_flush() {
  unsigned a = 7, b, c = 0, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (b >> 23 & 1) != 0;  // CLFLUSHOPT
}
#elif defined(__aarch64__)
void flush_lines(const char* begin, const char* end) {
  for (const char* at = begin; at < end; at += kLineBytes)
    __asm__ volatile("dc civac, %0" : : "r"(at) : "memory");
  __asm__ volatile("dsb ish" : : : "memory");
}

bool can_flush() { return true; }
#endif

}  // namespace

bool evict(const char* bytes, int64_t count) {
#if defined(__x86_64__) || defined(__aarch64__)
  if (!can_flush()) return false;
  const char* begin = bytes - reinterpret_cast<uintptr_t>(bytes) % kLineBytes;
  flush_lines(begin, bytes + count);
#if defined(__x86_64__)
  _mm_mfence();
#endif
  return true;
#else
  return false;
#endif
}

uint64_t read_stream(const Kernels& kernels, const char* bytes, int64_t count, int pages_ahead,
                     int threads) {
  return in_chunks(count, kChunk, threads, [&](int64_t begin, int64_t end) {
    return kernels.read(bytes + begin, end - begin, pages_ahead);
  });
}

uint64_t read_gathered(const Kernels& kernels, const GatherProbe& probe, int threads) {
  const int64_t keys = int64_t{probe.heads} * probe.count;
  const int64_t chunk = std::max<int64_t>(1, kChunk / 4 / probe.bytes);
  return in_chunks(keys, chunk, threads,
                   [&](int64_t begin, int64_t end) { return kernels.gather(probe, begin, end); });
}

}  // namespace visionpulse::cpu
