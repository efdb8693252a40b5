// SPDX-License-Identifier: Apache-2.0
// How the threads share the parts of a call, and make them one.
#pragma once

#include <algorithm>

#include "csrc/cpu/pool.h"
#include "kernels/cpu/call.h"

namespace visionpulse::cpu {

constexpr int kTurns = 8;  // of a thread, so that a slow one leaves little undone

inline int rows_of(const Call& c) { return c.B * c.queries.count; }

// The row of a task; row b has the tasks first(b) .. first(b + 1) - 1.
template <class First>
inline int row_of_task(int rows, int task, First first) {
  int low = 0, high = rows - 1;
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (first(mid) <= task) {
      low = mid;
    } else {
      high = mid - 1;
    }
  }
  return low;
}

// Whether K and V of a token have their heads side by side.
inline bool heads_in_token(const CacheArgs& a) {
  return a.k_stride.head < a.k_stride.token && a.v_stride.head < a.v_stride.token;
}

// Parts that run together read a token whole, where its heads lie side by side, or a page: a head
// by itself would come back to every token's row, or page. Which parts do is no part of the
// arithmetic.
inline int heads_together(const Call& c, int parts, int threads, bool is_list) {
  if (!heads_in_token(c.cache) && (is_list || c.cache.table == nullptr)) return 1;
  // their queries fill no more than those of the largest group; the rows of a list arrive later
  int heads = std::min({c.G, kMaxGroup / padded_heads(c.H / c.G), is_list ? 4 : 8});
  if (threads > 1) heads = std::max(1, std::min(heads, parts / (threads * kTurns)));
  while (c.G % heads != 0) --heads;
  return heads;
}

using PartEntry = void (*)(const Call&, int32_t, int32_t, int32_t, Run);
using MergeEntry = void (*)(const Call&, int, int);
using Around = void (*)(const Call&, void (*)(void*), void*);

// What runs the parts of a call; `merge` makes those of a row and KV head one, nullptr: none does.
struct PartKernels {
  Around around;
  PartEntry part;
  MergeEntry merge;
};

// How the parts of all rows are shared, counted in KV heads that run together: a thread takes
// `length` neighbours at a time, so that each part prefetches the next one's first keys.
struct Turns {
  int heads, parts, length;

  int first_of(const Cut& cut) const { return cut.first_part / heads; }
  // Whether one turn takes all parts of the heads whose first one is given. It then merges them
  // too, while they are in its caches.
  bool has_whole(const Cut& cut, int first) const {
    return cut.n_parts > 0 && first / length == (first + cut.n_parts - 1) / length;
  }
};

inline Turns turns_of(int all_parts, int threads, int heads) {
  const int parts = all_parts / heads;
  return {heads, parts, std::max(1, threads > 1 ? parts / (threads * kTurns) : parts)};
}

inline void merge_rest(const Call& c, const Turns& turns, int threads, MergeEntry merge) {
  parallel(rows_of(c) * c.G, threads, [&](int task) {
    const int row = task / c.G, head = task % c.G;
    if (!c.shared) {
      const Cut& cut = c.cuts[row];
      if (turns.has_whole(cut, turns.first_of(cut) + head / turns.heads * cut.n_parts)) return;
    }
    merge(c, row, head);
  });
}

// A row stays on one memory node, or one of its KV heads where there are fewer rows than nodes.
inline void run_parts(const Call& c, int all_parts, int threads, int heads,
                      const PartKernels& kernels) {
  const int cuts = c.shared ? c.B : rows_of(c), head_groups = c.G / heads;
  const bool in_pages = heads > 1 && !heads_in_token(c.cache);
  const Turns turns = turns_of(all_parts, threads, heads);
  const auto row_of_part = [&](int part) {
    return row_of_task(cuts, part, [&](int b) { return turns.first_of(c.cuts[b]); });
  };
  const auto run_turn = [&](int turn) {
    const int begin = turn * turns.length, end = std::min(turns.parts, begin + turns.length);
    for (int part = begin; part < end; ++part) {
      const int row = row_of_part(part);
      const Cut& cut = c.cuts[row];
      const int at = part - turns.first_of(cut), index = at % cut.n_parts;
      const int head = at / cut.n_parts * heads;
      kernels.part(c, row, head, index,
                   {part == begin || at == 0, part + 1 == end, heads, in_pages});
      const bool merges = kernels.merge != nullptr && !c.shared && index + 1 == cut.n_parts &&
                          turns.has_whole(cut, part - index);
      for (int h = 0; merges && h < heads; ++h) kernels.merge(c, row, head + h);
    }
  };
  const auto take = [&](int turn) {
    auto run = [&] { run_turn(turn); };
    kernels.around(c, [](void* of) { (*static_cast<decltype(run)*>(of))(); }, &run);
  };
  parallel((turns.parts + turns.length - 1) / turns.length, threads, take, [&](int turn) {
    const int part = turn * turns.length;
    const Cut& cut = c.cuts[row_of_part(part)];
    const int unit = cuts > 1 ? cut.n_parts * head_groups : cut.n_parts;
    return (turns.first_of(cut) + (part - turns.first_of(cut)) / unit * unit) / turns.length;
  });
  if (kernels.merge != nullptr) merge_rest(c, turns, threads, kernels.merge);
}

}  // namespace visionpulse::cpu
