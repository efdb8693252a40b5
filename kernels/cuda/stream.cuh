// SPDX-License-Identifier: Apache-2.0
// The kernel behind score and attend. A block streams one range of a row's keys for the query heads
// of one KV head. Each of its warps prefetches tiles of its own, keeps a softmax of its own, and
// meets no other warp before the end. Heads that the registers of one warp cannot hold are spread
// over a team of warps: its members load tiles in turn, use each tile together, and wait only for
// each other. At the end the parts are merged in a fixed order: those of a block in shared memory,
// those of a row by the block that arrives last.
#pragma once

#include "kernels/common/softmax.h"
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/shared_layout.h"
#include "kernels/cuda/tile_copy.cuh"
#include "kernels/cuda/tile_for.cuh"
#include "kernels/cuda/work.cuh"

namespace visionpulse::cuda {

// Set in a logit index: the key is visual. The host keeps indices below it.
constexpr int32_t kVisualBit = 1 << 30;

// One warp of a block, with kHeads of the query heads.
template <class T, int D, int kHeads, bool kScore, bool kSeveral>
struct Stream {
  using Tile = TileOf<T, D, kHeads>;
  using Cache = typename KindOf<T>::Cache;
  static constexpr bool kBulk = kBulkCopies && Tile::kInPlace;

  const StreamArgs& args;
  const WorkRange& work;
  const Spans& spans;
  const QueryHeads<kSeveral>& own;
  Tile tile;
  float m[Tile::kSlots], l[Tile::kSlots];             // running maximum of z * log2(e), and sum
  float l_tau[Tile::kSlots], l_visual[Tile::kSlots];  // at tau: over all, and over visual keys
  const void* query;                                  // shared, of this warp's heads
  const float* factors;                               // shared, of this warp's heads
  char* weights;                                      // shared, of this warp
  int32_t* logit_indices;                             // shared, of the team: [stages][keys]
  CopyBarrier* barriers;                              // shared, of the team: [stages]
  char* stages;                                       // shared, of the team
  int32_t heads;                                      // of this warp
  int32_t team, member;                               // team of the block, warp of the team
  KeyFinder<kScore> finder;
  Key next_key;        // this lane's, of the tile to be loaded next
  int32_t next_index;  // of that tile's first key, in the virtual order

  __device__ __forceinline__ Stream(const StreamArgs& of, const WorkRange& range,
                                    const Spans& of_row, const QueryHeads<kSeveral>& of_block)
      : args(of), work(range), spans(of_row), own(of_block) {}

  // The key of this lane in the tile that begins at next_index, in the virtual order; -1: none.
  __device__ __forceinline__ int32_t own_index() const {
    const int32_t index = next_index + lane_id();
    return lane_id() < Tile::kKeys && index < work.end ? index : -1;
  }
  __device__ __forceinline__ void find_next() {
    next_key = finder.find(args, work, own_index());
    next_index += Tile::kKeys * (blockDim.x / kThreadsPerWarp);  // the next tile of this member
    finder.look_ahead(args, work, own_index());
  }

  __device__ __forceinline__ void wait_for_team() {
    if (args.team == 1) return __syncwarp();
    team_barrier(1 + team, args.team * kThreadsPerWarp);
  }

  // Starts the copies of the tile found last, and finds the next.
  __device__ __forceinline__ void prefetch(int32_t stage) {
    const uint32_t valid_mask = __ballot_sync(kAllLanes, next_key.logit_index >= 0);
    char* to = stages + stage * (args.k_bytes + args.v_bytes);
    if (lane_id() < Tile::kKeys) {
      logit_indices[stage * Tile::kKeys + lane_id()] = next_key.logit_index < 0 || !next_key.visual
                                                           ? next_key.logit_index
                                                           : next_key.logit_index | kVisualBit;
    }
    if (args.stored_logits) copy_logits(to, valid_mask);
    if (!copy_whole_tile(to, valid_mask, barriers + stage)) {
      if (!args.stored_logits) {
        copy_tile<Cache, D, Tile>(to, keys(), next_key.k, valid_mask, args.head_dim, args.align);
      }
      if (args.v_bytes) {
        copy_tile<Cache, D, Tile>(to + args.k_bytes, values(), next_key.v, valid_mask,
                                  args.head_dim, args.align);
      }
    }
    find_next();
  }

  __device__ __forceinline__ const Cache* keys() const {
    return static_cast<const Cache*>(args.kv.k) + work.g * args.kv.k_stride.head;
  }
  __device__ __forceinline__ const Cache* values() const {
    return static_cast<const Cache*>(args.kv.v) + work.g * args.kv.v_stride.head;
  }

  // Whether the copy engine brings the tile, as one run of bytes of K and one of V. It is slow with
  // the short runs of a gathered tile.
  __device__ __forceinline__ bool copy_whole_tile(char* to, uint32_t valid_mask,
                                                  CopyBarrier* barrier) {
    if (!kBulk || !args.bulk) return false;
    const int64_t first_k = __shfl_sync(kAllLanes, next_key.k, 0),
                  first_v = __shfl_sync(kAllLanes, next_key.v, 0);
    const int32_t offset = lane_id() * D;
    const bool apart = next_key.k != first_k + offset || next_key.v != first_v + offset;
    const bool whole = valid_mask == kAllLanes >> (32 - Tile::kKeys) &&
                       !__any_sync(kAllLanes, apart && lane_id() < Tile::kKeys);
    if (whole) {
      fence_copy_engine();  // behind every lane's earlier use of this stage
      __syncwarp();
    }
    if (lane_id() == 0) {
      const int32_t k_bytes = args.stored_logits ? 0 : args.k_bytes;
      copy_barrier_expect(barrier, whole ? k_bytes + args.v_bytes : 0);
      if (whole && k_bytes) copy_bulk(to, keys() + first_k, k_bytes, barrier);
      if (whole && args.v_bytes) {
        copy_bulk(to + args.k_bytes, values() + first_v, args.v_bytes, barrier);
      }
    }
    return whole;
  }

  // The stored logits of a tile, [head of the team][key].
  __device__ __forceinline__ void copy_logits(char* to, uint32_t valid_mask) {
    const int64_t first = static_cast<int64_t>(work.b) * args.heads + work.g * args.group;
    for (int i = lane_id(); i < args.team * kHeads * Tile::kKeys; i += kThreadsPerWarp) {
      const int head = i / Tile::kKeys, key = i % Tile::kKeys;
      const int32_t logit_index = __shfl_sync(kAllLanes, next_key.logit_index, key);
      const bool valid = (valid_mask >> key & 1) && head < args.group;
      copy_4(to + i * 4,
             args.stored_logits + (valid ? (first + head) * args.logits_stride + logit_index : 0),
             valid ? 4 : 0);
    }
  }

  // Asks for what the first tile is found by, which comes while q is stored.
  __device__ __forceinline__ void start(int32_t teams) {
    next_index = work.begin + (team + member * teams) * Tile::kKeys;
    finder.kept = -1;
    finder.look_ahead(args, work, own_index());
  }

  __device__ __forceinline__ void run() {
    tile.clear();
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) {
      m[s] = minus_infinity();
      l[s] = l_tau[s] = l_visual[s] = 0.0f;
    }
    const int32_t first = work.begin + team * Tile::kKeys;
    const int32_t stride = args.rule.tile;  // all teams take a tile each
    const int32_t tiles = first < work.end ? (work.end - first + stride - 1) >> args.tile_log2 : 0;
    finder.start(args, work, spans, next_index);
    find_next();
    init_barriers();
    int32_t stage = 0, refill = 0;
    uint32_t phase = 0;
    VP_UNROLL_1 for (int32_t t = 1 - args.stages; t < tiles; ++t) {
      const int32_t next = t + args.stages - 1;
      if (next < tiles && (next & (args.team - 1)) == member) prefetch(refill);
      copy_commit();  // by every member: where another loads, an empty group keeps the count
      refill = refill + 1 == args.stages ? 0 : refill + 1;
      if (t < 0) continue;
      copy_wait_for(args.stages - 1);
      if (kBulk && args.bulk) copy_barrier_wait(barriers + stage, phase);
      wait_for_team();
      compute(stage, first + t * stride);
      wait_for_team();  // the stage that is filled next must be free
      if (++stage == args.stages) stage = 0, phase ^= 1;
    }
  }

  __device__ __forceinline__ void init_barriers() {
    if (!kBulk || !args.bulk) return;
    if (member == 0 && lane_id() < args.stages) copy_barrier_init(barriers + lane_id());
    fence_copy_engine();
    wait_for_team();
  }

  // One tile: logits, what the score needs of them, softmax, V. `first` is its first key, in the
  // virtual order.
  __device__ __forceinline__ void compute(int32_t stage, int32_t first) {
    const char* k = stages + stage * (args.k_bytes + args.v_bytes);
    float z[Tile::kZ];
    int32_t logit_index[Tile::kOwned];
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      logit_index[Tile::owned_of(i)] = logit_indices[stage * Tile::kKeys + Tile::key_of(i)];
    }
    if (args.stored_logits) {
      const auto* stored = reinterpret_cast<const float*>(k) + member * kHeads * Tile::kKeys;
      VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
        z[i] = stored[Tile::head_of(i) * Tile::kKeys + Tile::key_of(i)];
      }
    } else {
      Tile::dot(query, k, z);
      VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
        z[i] *= KindOf<T>::kScaled ? factors[Tile::head_of(i)] : args.scale;
      }
      if (args.softcap > 0.0f) {
        VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
          z[i] = args.softcap * tanhf(z[i] / args.softcap);
        }
      }
    }
    if (kScore) store_logits(z, logit_index);
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      z[i] = logit_index[Tile::owned_of(i)] < 0 ? minus_infinity() : z[i] * kLog2e;
    }
    if constexpr (kSeveral) hide_keys(z, work.keys.begin + first);
    raise_maximum(z);
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      const int s = Tile::slot_of(i);
      const float x = z[i] - safe_max(m[s]);
      if (kScore) {
        const float p = fast_exp2(x * args.inverse_tau);
        l_tau[s] += p;
        if (logit_index[Tile::owned_of(i)] >= kVisualBit) l_visual[s] += p;
      }
      z[i] = fast_exp2(x);
      l[s] += z[i];
    }
    if (args.v_bytes) tile.accumulate(z, weights, k + args.k_bytes);
  }

  // Takes out what a query does not see of a tile: by far the most tiles are seen by all.
  __device__ __forceinline__ void hide_keys(float (&z)[Tile::kZ], int32_t position) const {
    if (work.queries.all_see(position, Tile::kKeys)) return;
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      const int32_t query = own.query_of(member * kHeads + Tile::head_of(i));
      if (!work.queries.sees(query, position + Tile::key_of(i))) z[i] = minus_infinity();
    }
  }

  // Raises the maximum of each head to the tile's, and rescales the sums made under the old one.
  __device__ __forceinline__ void raise_maximum(const float (&z)[Tile::kZ]) {
    float top[Tile::kSlots], rescale[Tile::kSlots];
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) top[s] = m[s];
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      top[Tile::slot_of(i)] = fmaxf(top[Tile::slot_of(i)], z[i]);
    }
    bool raised = false;
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) {
      VP_UNROLL for (int bit = Tile::kHeadLanes; bit < 32; bit *= 2) {
        top[s] = fmaxf(top[s], __shfl_xor_sync(kAllLanes, top[s], bit));
      }
      raised = raised || top[s] > m[s];
    }
    if (!__any_sync(kAllLanes, raised)) return;
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) {
      const float exponent = rescale_exponent(m[s], top[s]);
      rescale[s] = fast_exp2(exponent);
      l[s] *= rescale[s];
      if (kScore) {
        const float rescale_tau = fast_exp2(exponent * args.inverse_tau);
        l_tau[s] *= rescale_tau;
        l_visual[s] *= rescale_tau;
      }
      m[s] = top[s];
    }
    if (args.v_bytes) tile.rescale(rescale);
  }

  // Stores the logits of a tile, or their sums over heads, for the stages that follow.
  __device__ __forceinline__ void store_logits(const float (&z)[Tile::kZ],
                                               const int32_t (&logit_index)[Tile::kOwned]) {
    const int32_t least = args.store == StoredLogits::kAll ? 0 : kVisualBit;
    if (args.store != StoredLogits::kNone) {
      VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
        const int32_t index = logit_index[Tile::owned_of(i)];
        if (index >= least && Tile::head_of(i) < heads) {
          const int64_t row = own.row_of(work.b, work.g, member * kHeads, Tile::head_of(i));
          args.logits[row * args.logits_stride + (index & ~kVisualBit)] = z[i];
        }
      }
    }
    if (args.sums == nullptr) return;
    float sum[Tile::kOwned];
    VP_UNROLL for (int o = 0; o < Tile::kOwned; ++o) sum[o] = 0.0f;
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      sum[Tile::owned_of(i)] += Tile::head_of(i) < heads ? z[i] : 0.0f;
    }
    VP_UNROLL for (int o = 0; o < Tile::kOwned; ++o) {
      VP_UNROLL for (int bit = 1; bit < Tile::kHeadLanes; bit *= 2) {
        sum[o] += __shfl_xor_sync(kAllLanes, sum[o], bit);
      }
      const bool first = lane_id() % Tile::kHeadLanes == 0;
      if (first && logit_index[o] >= kVisualBit) {
        const int64_t part = kv_head_index(work) * args.team + member;
        args.sums[part * args.logits_stride + (logit_index[o] & ~kVisualBit)] = sum[o];
      }
    }
  }

  // The softmax state of this warp's heads, [head][kPartStats].
  __device__ __forceinline__ void write_stats(float* to) {
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) {
      VP_UNROLL for (int bit = Tile::kHeadLanes; bit < 32; bit *= 2) {
        l[s] += __shfl_xor_sync(kAllLanes, l[s], bit);
        if (kScore) {
          l_tau[s] += __shfl_xor_sync(kAllLanes, l_tau[s], bit);
          l_visual[s] += __shfl_xor_sync(kAllLanes, l_visual[s], bit);
        }
      }
    }
    if (lane_id() >= Tile::kHeadLanes) return;
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      const int s = Tile::slot_of(i);
      if (Tile::owned_of(i) != 0) continue;
      float* of = to + Tile::head_of(i) * kPartStats;
      of[0] = m[s], of[1] = l[s], of[2] = l_tau[s], of[3] = l_visual[s];
    }
  }
};

template <class T, int D, int kHeadTile, bool kScore>
VP_DEVICE void stream(const StreamArgs& args) {
  constexpr int kHeads = kWarpHeads<T, D, kHeadTile>;
  constexpr bool kSeveral = of_several_queries(kHeadTile);
  using S = Stream<T, D, kHeads, kScore, kSeveral>;
  using Tile = typename S::Tile;
  VP_SHARED(shared);
  wait_for_previous();
  // Asked for together, before any of it is used: what describes the row, and q.
  const Spans spans = Spans::of(args.visual, blockIdx.z);
  typename TileFor<T, D, kHeads, kSeveral>::Query queries(args);
  queries.load(0);
  const float v_scale =
      KindOf<T>::kScaled ? scale_of(args.kv.v_scale, kv_head_of<kSeveral>(args)) : 1.0f;
  const WorkRange work = work_of<kSeveral>(args, spans);
  if (work.split > 0 && work.begin == work.end) return;
  const int32_t warp = threadIdx.x / kThreadsPerWarp, warps = blockDim.x / kThreadsPerWarp;
  const int32_t teams = warps >> args.team_log2;
  S part(args, work, spans, queries.heads);
  // by a shuffle, or the compiler would compute it anew in each tile
  part.team = __shfl_sync(kAllLanes, warp >> args.team_log2, 0);
  part.member = warp - (part.team << args.team_log2);
  part.start(teams);
  auto* factors = reinterpret_cast<float*>(shared + args.team * Tile::kQueryBytes);
  queries.store_all(shared, factors);
  __syncthreads();

  const SharedLayout at = shared_layout(warp_tile<Tile, kHeads>(), warps, args.team, args.stages,
                                        args.k_bytes + args.v_bytes);
  part.heads = queries.heads.count() - part.member * kHeads;
  part.query = shared + part.member * Tile::kQueryBytes;
  part.factors = factors + part.member * kHeads;
  auto* own = reinterpret_cast<char*>(shared) + at.warps;
  char* leader = own + part.team * args.team * at.warp_pitch;  // the team's first warp
  part.weights = own + warp * at.warp_pitch;
  part.barriers = reinterpret_cast<CopyBarrier*>(leader + at.barriers);
  part.logit_indices = reinterpret_cast<int32_t*>(leader + at.indices);
  part.stages = reinterpret_cast<char*>(shared) + at.stages + part.team * at.team_pitch;
  part.run();

  let_next_start();
  copy_wait<0>();
  __syncthreads();  // the stages are free
  auto* stats = reinterpret_cast<float*>(shared + at.stages);
  auto* sums = reinterpret_cast<float*>(shared + at.sums);
  part.write_stats(stats + warp * kHeads * kPartStats);
  if (args.v_bytes) part.tile.write_sums(sums + warp * Tile::kSumBytes / 4);
  __syncthreads();
  merge_teams<T, D, kHeads, Tile::kParts, kScore>(args, work, queries.heads, stats, sums, teams,
                                                  v_scale);
}

template <class T, int D, int kHeadTile>
constexpr StreamKernel describe(const void* function, const char* name) {
  constexpr int kHeads = kWarpHeads<T, D, kHeadTile>;
  using Tile = TileOf<T, D, kHeads>;
  return {function,
          name,
          kHeadTile,
          D,
          warp_tile<Tile, kHeads>(),
          Tile::kKeys * Tile::kKeyBytes,
          Tile::kInPlace,
          kResidentFor<T, D, kHeadTile>};
}

}  // namespace visionpulse::cuda
