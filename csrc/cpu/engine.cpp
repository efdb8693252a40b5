// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/engine.h"

#include <algorithm>
#include <limits>

#include "csrc/arena.h"
#include "csrc/cpu/pool.h"
#include "csrc/cpu/run_parts.h"
#include "kernels/common/split.h"
#include "kernels/common/visual_spans.h"

namespace visionpulse::cpu {
namespace {

// 128 parts of a row keep 64 threads busy. No prefetch covers the first block of a part; 512 keys
// make up for that.
constexpr SplitRule kRule = {128, 512, 4096, kBlock};

// The most parts that a KV head's cut of up to `keys` keys can have.
int64_t most_parts(int32_t keys, int32_t kv_heads) {
  const int64_t by_shortest = split_count(keys, kRule.shortest);
  const int64_t by_rule = (kRule.target_parts + kv_heads - 1) / kv_heads + 1;
  return std::max<int64_t>(std::min(by_shortest, by_rule), split_count(keys, kRule.longest));
}

// What a call needs scratch memory for.
struct Needs {
  bool logits = false;      // stored logits, and statistics of the heads
  bool stream = false;      // parts of a pass over all visible keys
  bool attended = false;    // positions of text and kept tokens, and parts of a pass over them
  bool candidates = false;  // their codes and positions
  bool scores = false;      // of the visible keys
  int32_t k_max = 0;
};

// A pass over all visible keys is one of each cache row, for all of its queries.
struct Plan {
  Row* rows;                // [B * Q]
  SharedPass* passes;       // [B] of several queries
  Cut *visible, *attended;  // [B], [B * Q]
  int32_t* chunks;          // [B + 1] score tasks of the cache rows before
  int32_t visible_parts, n_chunks;
  int32_t shared_heads, row_heads;  // in a part of a cache row, and of a row
  int64_t shared_floats, row_floats;
};

Row row_of(const Call& c, int index) {
  Row row = {};
  const CacheArgs& a = c.cache;
  const int queries = c.queries.count, b = index / queries, query = index % queries;
  row.cache_row = b;
  row.query = query;
  // its own key is its last; a query that is not real has none
  int32_t end = a.lengths != nullptr ? std::min(a.lengths[b], a.capacity) : a.capacity;
  end -= queries - 1 - query;
  if (c.queries.real != nullptr && query < queries - c.queries.real[b]) end = 0;
  row.visible =
      visible_range(a.starts != nullptr ? a.starts[b] : 0, end, a.capacity, c.score.window);
  row.padded_keys = (row.visible.end - row.visible.begin + kBlock - 1) / kBlock * kBlock;
  if (c.visual.spans != nullptr) {
    const int32_t s = c.visual.spans_per_row;
    const int32_t* spans = c.visual.spans + int64_t{b} * s * 2;
    const int32_t* offsets = c.visual.offsets + int64_t{b} * (s + 1);
    row.n_visual = visual_before(spans, offsets, s, row.visible.end) -
                   visual_before(spans, offsets, s, row.visible.begin);
  }
  return row;
}

// What the queries of a cache row share; `rows` are their rows, whose first heads it sets.
SharedPass shared_pass_of(const Call& c, int width, Row* rows) {
  SharedPass all = {};
  const int queries = c.queries.count, group = c.H / c.G;
  const auto sees = [&](int i) { return rows[i].visible.begin < rows[i].visible.end; };
  while (all.first < queries && !sees(all.first)) ++all.first;
  if (all.first == queries) return all;
  const Range from = rows[all.first].visible, to = rows[queries - 1].visible;
  all.seen = {from.begin, to.end};
  all.common = {to.begin, from.end};
  all.count = (queries - all.first) * group;
  all.padded = (all.count + width - 1) / width * width;
  all.padded_keys = (all.seen.end - all.seen.begin + kBlock - 1) / kBlock * kBlock;
  for (int i = all.first; i < queries; ++i) rows[i].first_head = (i - all.first) * group;
  return all;
}

Cut cut_of(const int32_t* attended, int32_t begin, int32_t keys, int32_t kv_heads) {
  Cut cut = {attended, begin, keys, 0, 0, 0, kv_heads};
  if (keys > 0) {
    cut.part_keys = split_length(kRule, keys, kv_heads);
    cut.n_parts = split_count(keys, cut.part_keys);
  }
  return cut;
}

// What a phase of rows keeps for each of them.
void lay_out_row(const Call& c, const Needs& needs, Arena& arena, Row& row, int64_t* parts) {
  const int32_t visible = row.visible.end - row.visible.begin;
  if (needs.scores) row.scores = arena.take<float>(row.padded_keys);
  row.scores_begin = row.visible.begin;
  if (needs.attended) {
    const int32_t most =
        std::min(visible, visible - row.n_visual + std::min(needs.k_max, row.n_visual));
    row.attended = arena.take<int32_t>(most);
    *parts += c.G * most_parts(most, c.G);
  }
  if (needs.candidates) {
    row.codes = arena.take<uint32_t>(row.n_visual + kLanes);
    row.positions = arena.take<int32_t>(row.n_visual + kLanes);
  }
}

void lay_out(const Kernels& kernels, Call& c, const Needs& needs, Arena& arena, Plan& plan) {
  const int group = c.H / c.G, queries = c.queries.count, columns = padded_dim(c.D, kernels.unit);
  const bool several = queries > 1;
  plan = {};
  plan.rows = arena.take<Row>(rows_of(c));
  plan.passes = arena.take<SharedPass>(several ? c.B : 0);
  plan.visible = arena.take<Cut>(c.B);
  plan.attended = arena.take<Cut>(rows_of(c));
  plan.chunks = arena.take<int32_t>(c.B + 1);
  int64_t attended_parts = 0;
  int32_t most_heads = several ? 0 : padded_heads(group);
  for (int b = 0; b < c.B; ++b) {
    Row rows[kMaxQueries];
    for (int i = 0; i < queries; ++i) rows[i] = row_of(c, b * queries + i);
    SharedPass all = several ? shared_pass_of(c, kernels.width, rows) : SharedPass{};
    if (!several) {
      all.seen = rows[0].visible;
      all.padded = padded_heads(group);
      all.padded_keys = rows[0].padded_keys;
    }
    most_heads = std::max(most_heads, all.padded);
    if (needs.logits) {
      // the last query's tiles of heads reach past its heads
      const int64_t floats = int64_t{c.G} * all.padded_keys * all.padded;
      all.stored_logits = arena.take<float>(floats == 0 ? 0 : floats + (several ? kLanes : 0));
    }
    if (several && needs.stream) all.q = arena.take<float>(int64_t{c.G} * all.padded * columns);
    for (int i = 0; i < queries; ++i) {
      rows[i].stored_logits = all.stored_logits;
      if (all.stored_logits != nullptr) rows[i].stored_logits += rows[i].first_head;
      lay_out_row(c, needs, arena, rows[i], &attended_parts);
      if (plan.rows != nullptr) plan.rows[b * queries + i] = rows[i];
    }
    const int32_t seen = all.seen.end - all.seen.begin;
    Cut cut = cut_of(nullptr, all.seen.begin, seen, c.G);
    cut.first_part = plan.visible_parts;
    plan.visible_parts += needs.stream ? c.G * cut.n_parts : 0;
    if (plan.rows != nullptr) {
      if (several) plan.passes[b] = all;
      plan.visible[b] = cut;
      plan.chunks[b] = plan.n_chunks;
    }
    plan.n_chunks += (seen + kScoreChunk - 1) / kScoreChunk;
  }
  if (plan.rows != nullptr) plan.chunks[c.B] = plan.n_chunks;
  c.rows = plan.rows;
  c.passes = plan.passes;
  const auto part_floats = [&](int64_t padded, int64_t heads) {
    return (4 * padded + kLanes - 1) / kLanes * kLanes + heads * columns;
  };
  plan.row_heads = padded_heads(group);
  plan.row_floats = part_floats(plan.row_heads, group);
  plan.shared_heads = most_heads;
  plan.shared_floats = several ? part_floats(most_heads, most_heads) : plan.row_floats;
  c.parts = arena.take<float>(
      std::max(plan.visible_parts * plan.shared_floats, attended_parts * plan.row_floats));
  const int64_t lanes = several ? most_heads : head_tiles(group) * kLanes;
  const int64_t numbers = needs.logits ? int64_t{c.B} * c.G * lanes : 0;
  c.head_max = arena.take<float>(numbers);
  c.head_weight = arena.take<float>(numbers);
}

// Plans a call in the scratch memory. Returns 0, or the bytes it needs if there are fewer.
int64_t plan_call(const Kernels& kernels, Call& c, const Needs& needs, const Scratch& scratch,
                  Plan& plan) {
  // the caller's memory may begin anywhere
  constexpr int64_t kAlign = 64;
  Arena measure(nullptr, 0, kAlign);
  lay_out(kernels, c, needs, measure, plan);
  const int64_t bytes = measure.used() + kAlign;
  if (bytes > scratch.size) return bytes;
  const auto base = (reinterpret_cast<uintptr_t>(scratch.bytes) + kAlign - 1) / kAlign * kAlign;
  Arena arena(reinterpret_cast<void*>(base), bytes, kAlign);
  lay_out(kernels, c, needs, arena, plan);
  return 0;
}

// The kernels of a pass whose parts `part` computes.
PartKernels part_kernels(const Kernels& kernels, const Call& c, PartEntry part) {
  const auto& merge = c.cache.dtype == DType::kFloat8 ? kernels.merge_float8 : kernels.merge;
  return {kernels.around_parts, part, c.with_values ? merge[static_cast<int>(c.dtype)] : nullptr};
}

// Where one thread merges the KV heads one after the other, `heads` at a time, and nothing reads
// their parts later, all of them use the places of the first: those are in its caches.
void share_places(Cut* cuts, int count, int heads, int threads) {
  for (int i = 0; threads == 1 && i < count; ++i) cuts[i].heads = heads;
}

// The pass over all visible keys.
void stream(const Kernels& kernels, Call& c, const Plan& plan, int threads) {
  const int type = storage_of(c);
  c.cuts = plan.visible;
  c.shared = c.queries.count > 1;
  c.part_heads = plan.shared_heads;
  c.part_floats = plan.shared_floats;
  const int heads = heads_together(c, plan.visible_parts, threads, false);
  if (!c.shared) {
    if (!c.store_logits) share_places(plan.visible, c.B, heads, threads);
    return run_parts(c, plan.visible_parts, threads, heads,
                     part_kernels(kernels, c, kernels.stream[type]));
  }
  const auto pack = kernels.pack_queries[type];
  parallel(c.B * c.G, threads, [&](int task) { pack(c, task / c.G, task % c.G); });
  run_parts(c, plan.visible_parts, threads, 1,
            part_kernels(kernels, c, kernels.stream_shared[type]));
}

// Lists the visible text and kept positions, ascending. Skips an index that is no visible visual
// position or not above the one before it, so none leads outside the cache.
int32_t list_attended(const Call& c, const Row& row, int b) {
  const int32_t* indices = c.selection.indices + int64_t{b} * c.selection.k_max;
  const int32_t count = std::min(std::max(c.selection.counts[b], 0), c.selection.k_max);
  const int32_t* spans = c.visual.spans + int64_t{row.cache_row} * c.visual.spans_per_row * 2;
  int32_t* out = row.attended;
  int32_t text = row.visible.begin, at = 0;
  for (int32_t s = span_after(spans, c.visual.spans_per_row, text);; ++s) {
    const bool last = s == c.visual.spans_per_row || spans[2 * s] >= row.visible.end;
    const int32_t begin = last ? row.visible.end : std::max(spans[2 * s], row.visible.begin);
    while (text < begin) *out++ = text++;
    if (last) break;
    const int32_t end = std::min(spans[2 * s + 1], row.visible.end);
    for (int32_t next = begin; at < count && indices[at] < end; ++at) {
      if (indices[at] < next) continue;
      next = indices[at] + 1;
      *out++ = indices[at];
    }
    text = end;
  }
  return static_cast<int32_t>(out - row.attended);
}

// Cuts the attended keys of every row. Returns the parts of all rows.
int cut_attended(Call& c, const Plan& plan, int threads) {
  const int rows = rows_of(c);
  parallel(rows, threads, [&](int b) {
    plan.attended[b] = cut_of(c.rows[b].attended, 0, list_attended(c, c.rows[b], b), c.G);
  });
  int parts = 0;
  for (int b = 0; b < rows; ++b) {
    plan.attended[b].first_part = parts;
    parts += c.G * plan.attended[b].n_parts;
  }
  c.cuts = plan.attended;
  c.shared = false;
  c.part_heads = plan.row_heads;
  c.part_floats = plan.row_floats;
  return parts;
}

// From stored logits to masses and scores.
void score_rows(const Kernels& kernels, Call& c, const Plan& plan, float* scores, int threads) {
  c.fill_scores = scores != nullptr;
  parallel(rows_of(c), threads, [&](int b) {
    Row& row = plan.rows[b];
    if (scores != nullptr) {
      float* all = scores + int64_t{b} * c.cache.capacity;
      std::fill(all, all + row.visible.begin, -std::numeric_limits<float>::infinity());
      std::fill(all + row.visible.end, all + c.cache.capacity,
                -std::numeric_limits<float>::infinity());
      row.scores = all;
      row.scores_begin = 0;
    }
    kernels.statistics(c, b);
  });
  parallel(plan.n_chunks, threads, [&](int task) {
    const int row = row_of_task(c.B, task, [&](int b) { return plan.chunks[b]; });
    const auto entry = c.shared ? kernels.score_shared : kernels.score;
    entry(c, row, task - plan.chunks[row]);
  });
}

}  // namespace

int64_t attend(const Kernels& kernels, Call c, const Scratch& scratch) {
  const bool sparse = c.selection.indices != nullptr;
  Needs needs;
  needs.stream = !sparse;
  needs.attended = sparse;
  needs.k_max = c.selection.k_max;
  Plan plan;
  if (const int64_t lacking = plan_call(kernels, c, needs, scratch, plan)) return lacking;
  c.with_values = true;
  if (sparse) {
    const int parts = cut_attended(c, plan, scratch.threads);
    const int heads = heads_together(c, parts, scratch.threads, true);
    share_places(plan.attended, rows_of(c), heads, scratch.threads);
    run_parts(c, parts, scratch.threads, heads,
              part_kernels(kernels, c, kernels.stream[storage_of(c)]));
  } else {
    stream(kernels, c, plan, scratch.threads);
  }
  return 0;
}

int64_t score(const Kernels& kernels, Call c, float* scores, const Scratch& scratch) {
  Needs needs;
  needs.logits = needs.stream = true;
  Plan plan;
  if (const int64_t lacking = plan_call(kernels, c, needs, scratch, plan)) return lacking;
  c.store_logits = true;
  c.with_values = c.out != nullptr;
  stream(kernels, c, plan, scratch.threads);
  score_rows(kernels, c, plan, scores, scratch.threads);
  return 0;
}

int64_t select(const Kernels& kernels, Call c, const float* scores, const Scratch& scratch) {
  Needs needs;
  needs.candidates = true;
  Plan plan;
  if (const int64_t lacking = plan_call(kernels, c, needs, scratch, plan)) return lacking;
  parallel(rows_of(c), scratch.threads, [&](int b) {
    plan.rows[b].scores = const_cast<float*>(scores) + int64_t{b} * c.cache.capacity;
    plan.rows[b].scores_begin = 0;
    kernels.select(c, b);
  });
  return 0;
}

int64_t decode(const Kernels& kernels, Call c, bool dense, float* scores, const Scratch& scratch) {
  Needs needs;
  needs.logits = needs.stream = needs.candidates = true;
  needs.scores = scores == nullptr;
  needs.attended = !dense;
  needs.k_max = c.score.k_max;
  Plan plan;
  if (const int64_t lacking = plan_call(kernels, c, needs, scratch, plan)) return lacking;
  c.store_logits = true;
  c.store_all_logits = !dense;
  c.with_values = dense;
  stream(kernels, c, plan, scratch.threads);
  score_rows(kernels, c, plan, scores, scratch.threads);
  parallel(rows_of(c), scratch.threads, [&](int b) { kernels.select(c, b); });
  if (dense) return 0;
  c.selection = {c.indices, c.counts, c.score.k_max};
  c.with_values = true;
  const int parts = cut_attended(c, plan, scratch.threads);
  share_places(plan.attended, rows_of(c), 1, scratch.threads);
  run_parts(c, parts, scratch.threads, 1, part_kernels(kernels, c, kernels.weigh[storage_of(c)]));
  return 0;
}

}  // namespace visionpulse::cpu
