// SPDX-License-Identifier: Apache-2.0
// The pass over K that score and attend share: one part of one KV head, block after block.
//
// The logits x of a block are [key tiles, head tiles, 16 lanes]. A tile holds 16 / HT keys of HT
// heads, lane = key * HT + head. With 8 query heads to a KV head, HT = 4 and 2 head tiles:
//
//               head tile 0                        head tile 1
//   key tile 0  k0h0 k0h1 k0h2 k0h3 k1h0 .. k3h3   k0h4 k0h5 k0h6 k0h7 k1h4 .. k3h7
//   key tile 1  k4h0 k4h1 k4h2 k4h3 k5h0 .. k7h3   k4h4 k4h5 k4h6 k4h7 k5h4 .. k7h7
//
//   dot_block      x = logits of Q K^T        prefetches K of a block ahead
//   store_logits   x to memory, for score
//   softmax_block  x = weights                updates max and sums, lane by lane
//   sum_block      acc += weights * V         prefetches V of a block ahead
#pragma once

#include "kernels/common/visual_spans.h"
#include "kernels/cpu/values.inl.h"

namespace visionpulse::cpu::VP_ISA {

// Keeps the logits of a block for the scores, and for the weights of a second pass. They are read
// after more of K and V than a cache holds, so they go past the caches: else each line is read
// before it is written.
VP_INLINE void store_logits(const Call& c, const Row& row, int kv_head, int first, const float* x,
                            int floats) {
  const int heads = padded_heads(c.H / c.G);
  float* to = row.stored_logits + (int64_t{kv_head} * row.padded_keys + first) * heads;
  for (int i = 0; i < floats; i += kWidth) vstream(to + i, vload(x + i));
  if (kStreams) return;
  // those of the next block: a store that misses waits for the line
  for (int i = 0; i < floats; i += kLine / 4) __builtin_prefetch(to + floats + i, 1, 3);
}

// Keys of a block. The sums of V go to memory and back once a block, so it is as long as L1 allows;
// in 32 bits, which wait for memory, half as long, and prefetches are half as early; asked for by
// pages it has eight of K and eight of V.
template <class T>
VP_INLINE int block_keys(const Call& c, const Cut& cut) {
  if (cut.attended != nullptr) return kListBlock;
  if (kAsksByPages && sizeof(T) > 1) return kListBlock;
  const int most = kByteBlock / static_cast<int>(sizeof(T));
  return sizeof(T) == 4 && c.with_values ? most / 2 : most;
}

template <class T, int HT>
static void stream_part(const Call& c, int row, int kv_head, int index, Run run) {
  const Cut& cut = c.cuts[row];
  const int cache_row = c.rows[row].cache_row;
  const int group = c.H / c.G, tiles = head_tiles(group), heads = tiles * HT;
  const PartRange range = range_of_part(cut, index);
  const SoftmaxArgs args = {1.0f / c.score.tau, c.store_logits};
  // those that each block's loop takes; heads in pages have blocks of their own
  const KvHeads together = {run.in_pages ? 1 : run.heads, c.cache.k_stride.head,
                            c.cache.v_stride.head};
  Query<T> q;
  TileState states[kMaxGroup / 4];  // [KV heads, head tiles]
  const int64_t head_sums = int64_t{group} * padded_dim(c.D, kUnit);
  Sums sums;
  for (int h = 0; h < run.heads; ++h) {
    Query<T>::load(q, c, row, kv_head + h, h * heads);
    for (int t = 0; t < tiles; ++t) TileState::reset(states[h * tiles + t]);
  }
  if (c.with_values) clear(sums.of, run.heads * head_sums);
  BlockVisual visual;
  visual.content = Content::kText;
  const int32_t* spans = c.visual.spans + int64_t{cache_row} * c.visual.spans_per_row * 2;
  int span = args.at_tau ? span_after(spans, c.visual.spans_per_row, cut.begin + range.begin) : 0;
  int span_of_stretch = span;

  const int block = block_keys<T>(c, cut);
  // more pages of memory than a few are too many at once
  constexpr int64_t kPieceBytes = 512;
  const int64_t key_bytes = c.cache.k_stride.token * static_cast<int64_t>(sizeof(T));
  const bool touches =
      !kAsksByPages &&
      (run.in_pages || (cut.attended == nullptr && key_bytes > 0 && key_bytes <= kPieceBytes));
  const bool one_row = c.cache.v == static_cast<const T*>(c.cache.k) + c.D;
  alignas(64) float x[kMostKeys * kMaxGroup];
  const Pass& pass = !c.with_values ? kPassOverK : args.at_tau ? kPassWithMass : kPassOverBoth;
  const PageTurns turns =
      kAsksByPages && together.count == 1 ? PageTurns::make(block, key_bytes) : PageTurns{0, 0};
  Rescales rescales;
  BlockKeys<T> buffers[2], tokens;
  Walk walk = Walk::of_part(c, cut, kv_head, index, block, run), next_walk = walk;
  const auto locate_next = [&](BlockKeys<T>& keys) {
    if (Walk::is_done(next_walk) && !run.is_last)
      Walk::enter_next_part(c, cut, block, run, next_walk);
    locate(c, cut, cache_row, next_walk.kv_head + next_walk.head, next_walk.first,
           next_walk.range.end, block, keys);
    Walk::step(c, cut, block, run, next_walk);
  };
  locate_next(buffers[0]);
  // the hardware's prefetcher finds the first keys of a stream, but not those of a list
  if (cut.attended != nullptr && run.is_first) {
    for (int h = 0; h < together.count; ++h) {
      prefetch_all(buffers[0].k, buffers[0].count, c.D, h * together.k_stride);
      if (c.with_values) prefetch_all(buffers[0].v, buffers[0].count, c.D, h * together.v_stride);
    }
  }
  for (int turn = 0; !Walk::is_done(walk); Walk::step(c, cut, block, run, walk), turn ^= 1) {
    const int first = walk.first;
    BlockKeys<T>& keys = buffers[turn];
    BlockKeys<T>& next = buffers[turn ^ 1];
    locate_next(next);
    if (touches) {
      touch_pages(next.k, next.count, c.cache.k_stride.token);
      if (c.with_values && !one_row) touch_pages(next.v, next.count, c.cache.v_stride.token);
    }
    if (args.at_tau) {
      if (first == walk.begin) {  // each head begins where the stretch does
        if (walk.head == 0) span_of_stretch = span;
        span = span_of_stretch;
      }
      find_visual<HT>(c.visual, cache_row, cut.begin + first, keys.count, span, visual);
    }
    const bool stores = args.at_tau && (c.store_all_logits || visual.content != Content::kText);
    const int floats = (keys.count + kLanes / HT - 1) / (kLanes / HT) * (kLanes / HT) * heads;
    for (int h = walk.head; h < walk.head + together.count; ++h) {
      const Scaling scaling = scaling_of(c.score, factor_of<T>(c.cache.k_scale, kv_head + h));
      if (together.count > 1) share_tokens(together, h, block, next, tokens);
      const BlockKeys<T>& wanted = together.count > 1 ? tokens : next;
      const bool in_turn = kAsksByPages && (cut.attended == nullptr || follow(next, block));
      // scattered vectors come sooner from places, where a type has them
      const bool by_steps = kHasNoPlaces<T> || in_turn;
      // V beside its K comes with it: asked for later it would be there, and memory idle meanwhile
      const bool asks_rows = by_steps && one_row && c.with_values;
      const T* const* const apart = c.with_values && !asks_rows ? wanted.v : nullptr;
      Asked<T> asked =
          Asked<T>::make(wanted.k, apart, block, lines_of<T>(asks_rows ? 2 * c.D : c.D),
                         by_steps ? &pass : nullptr, in_turn ? turns : PageTurns{0, 0});
      dot_block<T, HT>(q, h * heads, keys, c.D, tiles, scaling, asked, x);
      if (stores) store_logits(c, c.rows[row], kv_head + h, first, x, floats);
      softmax_block<HT>(tiles, keys.count, &visual, args, x, states + h * tiles, rescales,
                        ask_beside_softmax(asked, floats / kLanes));
      if (c.with_values) sum_block<T, HT>(c, keys, asked, x, rescales, sums.of + h * head_sums);
      if (h + 1 < together.count) next_head(together, keys);
    }
  }
  for (int h = 0; h < run.heads; ++h) {
    const Part part = part_at(c, part_index(cut, kv_head + h, index));
    store_part<HT>(states + h * tiles, tiles, part);
    if (c.with_values) Sums::store(sums, h * head_sums, head_sums, part);
  }
  if (c.store_logits) vstream_end();
}

}  // namespace visionpulse::cpu::VP_ISA
