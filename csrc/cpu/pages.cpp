// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/pages.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "csrc/cpu/pool.h"

namespace visionpulse::cpu {
namespace {

constexpr int64_t kTaskBytes = 1 << 18;  // less is copied faster than a worker wakes up

void write_token(const PageWrite& w, int64_t token) {
  const int64_t slot = w.slots[token];
  if (slot < 0) return;
  const int64_t page = slot / w.page_size, offset = slot % w.page_size;
  for (int head = 0; head < w.heads; ++head) {
    const PageStrides &ks = w.k_page_stride, &vs = w.v_page_stride;
    std::memcpy(w.k_pages + page * ks.page + head * ks.head + offset * ks.slot,
                w.k + token * w.k_stride.token + head * w.k_stride.head, w.bytes);
    std::memcpy(w.v_pages + page * vs.page + head * vs.head + offset * vs.slot,
                w.v + token * w.v_stride.token + head * w.v_stride.head, w.bytes);
  }
}

}  // namespace

void write_pages(const PageWrite& w, int threads) {
  const int64_t slots = w.pages * w.page_size;
  for (int64_t token = 0; token < w.tokens; ++token)
    if (w.slots[token] >= slots)
      throw std::invalid_argument("slot " + std::to_string(w.slots[token]) + " lies beyond the " +
                                  std::to_string(slots) + " slots of the pages");
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / (w.heads * w.bytes));
  const int64_t tasks = (w.tokens + per_task - 1) / per_task;
  parallel(static_cast<int>(tasks), threads, [&](int task) {
    const int64_t end = std::min(w.tokens, (task + 1) * per_task);
    for (int64_t token = task * per_task; token < end; ++token) write_token(w, token);
  });
}

}  // namespace visionpulse::cpu
