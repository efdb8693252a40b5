// SPDX-License-Identifier: Apache-2.0
// Attention that an anchor finishes from its stored logits: V over text and kept tokens.
#pragma once

#include "kernels/cpu/values.inl.h"

namespace visionpulse::cpu::VP_ISA {

// Where the stored logits of a row and KV head lie.
struct StoredLogits {
  const float* first;
  int32_t begin;    // position of the first
  int32_t stride;   // from a key to the next, in a pass that queries share; 0: in tiles
  int32_t to_tile;  // from a head tile to the next
};

template <int HT>
VP_INLINE StoredLogits stored_logits_of(const Call& c, int index, int kv_head, int tiles) {
  const Row& row = c.rows[index];
  if (c.passes == nullptr) {
    const int64_t heads = tiles * HT;
    return {row.stored_logits + kv_head * heads * row.padded_keys, row.visible.begin, 0, kLanes};
  }
  const SharedPass& pass = c.passes[row.cache_row];
  return {row.stored_logits + int64_t{kv_head} * pass.padded_keys * pass.padded, pass.seen.begin,
          pass.padded, HT};
}

// The stored logits of position n: HT heads.
template <int HT>
VP_INLINE const float* logits_at(const StoredLogits& stored, int tiles, int n) {
  constexpr int kTileKeys = kLanes / HT;
  const int key = n - stored.begin;
  if (stored.stride != 0) return stored.first + int64_t{key} * stored.stride;
  return stored.first + int64_t{key / kTileKeys} * tiles * kLanes + key % kTileKeys * HT;
}

template <class T, int HT>
VP_INLINE void prefetch_logits(const StoredLogits& stored, const BlockKeys<T>& keys, int tiles) {
  for (int i = 0; i < keys.count; ++i)
    __builtin_prefetch(logits_at<HT>(stored, tiles, keys.position[i]), 0, 3);
}

// The stored logits of a block's keys, in the layout of stream.inl.h. The heads past the group are
// any: no sum of theirs is read.
template <class T, int HT>
VP_INLINE void gather_logits(const StoredLogits& stored, const BlockKeys<T>& keys, int tiles,
                             float* x) {
  constexpr int kTileKeys = kLanes / HT;
  const int whole = (keys.count + kTileKeys - 1) / kTileKeys * kTileKeys;
  for (int i = 0; i < whole; ++i) {
    float* to = x + i / kTileKeys * tiles * kLanes + i % kTileKeys * HT;
    const float* at = logits_at<HT>(stored, tiles, keys.position[i < keys.count ? i : 0]);
    for (int t = 0; t < tiles; ++t)
      for (int h = 0; h < HT; ++h)
        to[t * kLanes + h] = i < keys.count ? at[t * stored.to_tile + h] : minus_infinity();
  }
}

template <class T, int HT>
static void weigh_part(const Call& c, int row, int kv_head, int index, Run run) {
  const Cut& cut = c.cuts[row];
  const int cache_row = c.rows[row].cache_row;
  const int group = c.H / c.G, tiles = head_tiles(group);
  const PartRange range = range_of_part(cut, index);
  const int64_t head_sums = int64_t{group} * padded_dim(c.D, kUnit);
  Sums sums;
  clear(sums.of, head_sums);
  TileState states[kMaxGroup / 4];
  for (int t = 0; t < tiles; ++t) TileState::reset(states[t]);
  alignas(64) float x[kListBlock * kMaxGroup];
  const int block = kListBlock;
  Rescales rescales;
  BlockKeys<T> buffers[2];
  const StoredLogits stored = stored_logits_of<HT>(c, row, kv_head, tiles);
  locate(c, cut, cache_row, kv_head, range.begin, range.end, block, buffers[0]);
  prefetch_logits<T, HT>(stored, buffers[0], tiles);
  if (run.is_first) prefetch_all(buffers[0].v, buffers[0].count, c.D);
  for (int first = range.begin, turn = 0; first < range.end; first += block, turn ^= 1) {
    BlockKeys<T>& keys = buffers[turn];
    BlockKeys<T>& next = buffers[turn ^ 1];
    if (first + block < range.end || run.is_last) {
      locate(c, cut, cache_row, kv_head, first + block, range.end, block, next);
      prefetch_logits<T, HT>(stored, next, tiles);
    } else {
      locate_next_part(c, cut, cache_row, kv_head, index, block, next);
    }
    gather_logits<T, HT>(stored, keys, tiles, x);
    const Pass* const pass = kHasNoPlaces<T> ? &kPassOverV : nullptr;
    Asked<T> asked =
        Asked<T>::make(nullptr, next.v, block, lines_of<T>(c.D), pass, PageTurns{0, 0});
    softmax_block<HT>(tiles, keys.count, nullptr, {1.0f, false}, x, states, rescales,
                      ask_beside_softmax(asked, (keys.count * HT + kLanes - 1) / kLanes * tiles));
    sum_block<T, HT>(c, keys, asked, x, rescales, sums.of);
  }
  const Part part = part_at(c, part_index(cut, kv_head, index));
  store_part<HT>(states, tiles, part);
  Sums::store(sums, 0, head_sums, part);
}

}  // namespace visionpulse::cpu::VP_ISA
