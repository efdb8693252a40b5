// SPDX-License-Identifier: Apache-2.0
// The kernel behind score and attend: a block streams one share of a row's keys for the query heads
// of one KV head. Its warps take tiles in turn and never meet before the end: each loads its own
// tile a few stages ahead, and keeps its own softmax. Heads that one warp's registers cannot hold
// are shared out over a team of warps, which load tiles in turn, use each together, and meet only
// each other. The parts are then joined in a fixed order, those of a block in shared memory, those
// of a row by the block that finishes last.
#pragma once

#include <type_traits>

#include "kernels/common/softmax.h"
#include "kernels/cuda/bulk.cuh"
#include "kernels/cuda/dots.cuh"
#include "kernels/cuda/fill.cuh"
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/row.cuh"

namespace visionpulse::cuda {

// Query heads that one warp holds, of the row tile that a block may hold.
template <class T, int kRowTile>
constexpr int kWarpRows = kRowTile <= 8              ? kRowTile
                          : Element<T>::kTensorCores ? 16
                                                     : 8;

// The tensor cores also where a tile of eight heads is half empty: their products cost nothing, and
// without them a tile of 16-bit keys takes as many issue slots as the memory leaves time for.
template <class T, int D, int kRows>
using TileOf =
    std::conditional_t<Element<T>::kTensorCores, MmaTile<T, D, kRows>, DotTile<D, kRows>>;

// Beside a place: the key there is visual. The host keeps places below it.
constexpr int32_t kVisualBit = 1 << 30;

// One warp of a block, with kRows of the query heads.
template <class T, int D, int kRows, bool kScore>
struct Stream {
  using Tile = TileOf<T, D, kRows>;
  static constexpr bool kBulk = kBulkCopies && Tile::kInPlace;

  const StreamArgs& args;
  const Share& share;
  Tile tile;
  float m[Tile::kSlots], l[Tile::kSlots];             // running maximum of z * log2(e), and sum
  float l_tau[Tile::kSlots], l_visual[Tile::kSlots];  // at tau: over all, and over visual keys
  const void* query;                                  // shared, of this warp's heads
  char* weights;                                      // shared, of this warp
  int32_t* places;                                    // shared, of the team: [stages][keys]
  Landing* landings;                                  // shared, of the team: [stages]
  char* stages;                                       // shared, of the team
  int32_t heads, first_head;                          // of this warp, and the first of all H
  int32_t team, member;                               // which team of the block, which warp of it
  KeyFinder<kScore> finder;
  Key ahead;         // of the tile to be loaded next
  int32_t ahead_at;  // its first key in the virtual order

  __device__ __forceinline__ Stream(const StreamArgs& of, const Share& mine)
      : args(of), share(mine) {}

  VP_DEVICE int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ void look_ahead() {
    const int32_t index = ahead_at + lane();
    ahead = finder.find(args, share, lane() < Tile::kKeys && index < share.end ? index : -1);
    ahead_at += Tile::kKeys * (blockDim.x / 32);  // the next tile of this member
  }

  // Waits for the warps that share the tiles.
  __device__ __forceinline__ void meet() {
    if (args.team == 1) return __syncwarp();
    team_barrier(1 + team, args.team * 32);
  }

  // Starts the copies of the tile found last, and finds the next.
  __device__ __forceinline__ void load(int32_t stage) {
    const uint32_t there = __ballot_sync(kWarp, ahead.place >= 0);
    char* to = stages + stage * (args.k_bytes + args.v_bytes);
    if (lane() < Tile::kKeys) {
      places[stage * Tile::kKeys + lane()] =
          ahead.place < 0 || !ahead.visual ? ahead.place : ahead.place | kVisualBit;
    }
    if (args.kept) fill_logits(to, there);
    if (!load_bulk(to, there, landings + stage)) {
      if (!args.kept) fill_tile<T, D, Tile>(to, keys(), ahead.k, there, args.head_dim, args.align);
      if (args.v_bytes) {
        fill_tile<T, D, Tile>(to + args.k_bytes, values(), ahead.v, there, args.head_dim,
                              args.align);
      }
    }
    look_ahead();
  }

  __device__ __forceinline__ const T* keys() const {
    return static_cast<const T*>(args.kv.k) + share.g * args.kv.k_stride.head;
  }
  __device__ __forceinline__ const T* values() const {
    return static_cast<const T*>(args.kv.v) + share.g * args.kv.v_stride.head;
  }

  // Whether the copy engine brings the tile: one run of bytes of K, and one of V. The engine is
  // slow with the short runs that the rows of a gathered tile would be.
  __device__ __forceinline__ bool load_bulk(char* to, uint32_t there, Landing* landing) {
    if (!kBulk || !args.bulk) return false;
    const int64_t first_k = __shfl_sync(kWarp, ahead.k, 0),
                  first_v = __shfl_sync(kWarp, ahead.v, 0);
    const int32_t row = lane() * D;
    const bool apart = ahead.k != first_k + row || ahead.v != first_v + row;
    const bool whole =
        there == (1u << Tile::kKeys) - 1 && !__any_sync(kWarp, apart && lane() < Tile::kKeys);
    if (whole) {
      fence_copy_engine();  // behind what each lane did with this stage before
      __syncwarp();
    }
    if (lane() == 0) {
      const int32_t k_bytes = args.kept ? 0 : args.k_bytes;
      landing_expect(landing, whole ? k_bytes + args.v_bytes : 0);
      if (whole && k_bytes) copy_bulk(to, keys() + first_k, k_bytes, landing);
      if (whole && args.v_bytes) {
        copy_bulk(to + args.k_bytes, values() + first_v, args.v_bytes, landing);
      }
    }
    return whole;
  }

  // The kept logits of a tile, [row of the team][key].
  __device__ __forceinline__ void fill_logits(char* to, uint32_t there) {
    const int64_t first = static_cast<int64_t>(share.b) * args.heads + share.g * args.group;
    for (int at = lane(); at < args.team * kRows * Tile::kKeys; at += 32) {
      const int row = at / Tile::kKeys, key = at % Tile::kKeys;
      const int32_t place = __shfl_sync(kWarp, ahead.place, key);
      const bool valid = (there >> key & 1) && row < args.group;
      copy_4(to + at * 4, args.kept + (valid ? (first + row) * args.logits_row + place : 0),
             valid ? 4 : 0);
    }
  }

  __device__ __forceinline__ void run(int32_t teams) {
    tile.clear();
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) {
      m[s] = minus_infinity();
      l[s] = l_tau[s] = l_visual[s] = 0.0f;
    }
    const int32_t first = share.begin + team * Tile::kKeys;
    const int32_t stride = teams * Tile::kKeys;
    const int32_t tiles = first < share.end ? (share.end - first + stride - 1) / stride : 0;
    ahead_at = first + member * stride;
    finder.start(args, share, ahead_at);
    look_ahead();
    start_landings();
    int32_t stage = 0, refill = 0;
    uint32_t phase = 0;
    VP_UNROLL_1 for (int32_t t = 1 - args.stages; t < tiles; ++t) {
      const int32_t next = t + args.stages - 1;
      if (next < tiles && (next & (args.team - 1)) == member) load(refill);
      copy_commit();  // by every member: where another loads, an empty group keeps the count
      refill = refill + 1 == args.stages ? 0 : refill + 1;
      if (t < 0) continue;
      copy_wait_for(args.stages - 1);
      if (kBulk && args.bulk) landing_wait(landings + stage, phase);
      meet();
      take(stage);
      meet();  // everybody is done with the stage that is filled next
      if (++stage == args.stages) stage = 0, phase ^= 1;
    }
  }

  __device__ __forceinline__ void start_landings() {
    if (!kBulk || !args.bulk) return;
    if (member == 0 && lane() < args.stages) landing_start(landings + lane());
    fence_copy_engine();
    meet();
  }

  // One tile: logits, what the score needs of them, softmax, V.
  __device__ __forceinline__ void take(int32_t stage) {
    const char* k = stages + stage * (args.k_bytes + args.v_bytes);
    float z[Tile::kZ];
    int32_t place[Tile::kOwned];
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      place[Tile::owned_of(i)] = places[stage * Tile::kKeys + Tile::key_of(i)];
    }
    if (args.kept) {
      const auto* kept = reinterpret_cast<const float*>(k) + member * kRows * Tile::kKeys;
      VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
        z[i] = kept[Tile::head_of(i) * Tile::kKeys + Tile::key_of(i)];
      }
    } else {
      Tile::dot(query, k, z);
      VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) z[i] *= args.scale;
      if (args.softcap > 0.0f) {
        VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
          z[i] = args.softcap * tanhf(z[i] / args.softcap);
        }
      }
    }
    if (kScore) keep(z, place);
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      z[i] = place[Tile::owned_of(i)] < 0 ? minus_infinity() : z[i] * kLog2e;
    }
    grow_maximum(z);
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      const int s = Tile::slot_of(i);
      const float x = z[i] - safe_max(m[s]);
      if (kScore) {
        const float p = fast_exp2(x * args.inverse_tau);
        l_tau[s] += p;
        if (place[Tile::owned_of(i)] >= kVisualBit) l_visual[s] += p;
      }
      z[i] = fast_exp2(x);
      l[s] += z[i];
    }
    if (args.v_bytes) tile.accumulate(z, weights, k + args.k_bytes);
  }

  // Raises each head's maximum to the tile's, and shrinks what was summed under the old one.
  __device__ __forceinline__ void grow_maximum(const float (&z)[Tile::kZ]) {
    float top[Tile::kSlots], by[Tile::kSlots];
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) top[s] = m[s];
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      top[Tile::slot_of(i)] = fmaxf(top[Tile::slot_of(i)], z[i]);
    }
    bool grown = false;
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) {
      VP_UNROLL for (int bit = Tile::kHeadLanes; bit < 32; bit *= 2) {
        top[s] = fmaxf(top[s], __shfl_xor_sync(kWarp, top[s], bit));
      }
      grown = grown || top[s] > m[s];
    }
    if (!__any_sync(kWarp, grown)) return;
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) {
      const float shrink = rescale_exponent(m[s], top[s]);
      by[s] = fast_exp2(shrink);
      l[s] *= by[s];
      if (kScore) {
        const float by_tau = fast_exp2(shrink * args.inverse_tau);
        l_tau[s] *= by_tau;
        l_visual[s] *= by_tau;
      }
      m[s] = top[s];
    }
    if (args.v_bytes) tile.rescale(by);
  }

  // Leaves the logits of a tile for the stages behind.
  __device__ __forceinline__ void keep(const float (&z)[Tile::kZ],
                                       const int32_t (&place)[Tile::kOwned]) {
    const int32_t wanted = args.keep == Keep::kAll ? 0 : kVisualBit;
    if (args.keep != Keep::kNone) {
      VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
        const int32_t at = place[Tile::owned_of(i)];
        if (at >= wanted && Tile::head_of(i) < heads) {
          const int64_t head = static_cast<int64_t>(share.b) * args.heads + first_head;
          args.logits[(head + Tile::head_of(i)) * args.logits_row + (at & ~kVisualBit)] = z[i];
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
        sum[o] += __shfl_xor_sync(kWarp, sum[o], bit);
      }
      const bool first = lane() % Tile::kHeadLanes == 0;
      if (first && place[o] >= kVisualBit) {
        const int64_t row = place_of(share) * args.team + member;
        args.sums[row * args.logits_row + (place[o] & ~kVisualBit)] = sum[o];
      }
    }
  }

  // The softmax state of this warp's heads, [row][kPartStats].
  __device__ __forceinline__ void drain_stats(float* to) {
    VP_UNROLL for (int s = 0; s < Tile::kSlots; ++s) {
      VP_UNROLL for (int bit = Tile::kHeadLanes; bit < 32; bit *= 2) {
        l[s] += __shfl_xor_sync(kWarp, l[s], bit);
        if (kScore) {
          l_tau[s] += __shfl_xor_sync(kWarp, l_tau[s], bit);
          l_visual[s] += __shfl_xor_sync(kWarp, l_visual[s], bit);
        }
      }
    }
    if (lane() >= Tile::kHeadLanes) return;
    VP_UNROLL for (int i = 0; i < Tile::kZ; ++i) {
      const int s = Tile::slot_of(i);
      if (Tile::owned_of(i) != 0) continue;
      float* of = to + Tile::head_of(i) * kPartStats;
      of[0] = m[s], of[1] = l[s], of[2] = l_tau[s], of[3] = l_visual[s];
    }
  }
};

// Shared memory: q, then each warp's weights, landings and places, then each team's stages; at the
// end the stages hold the parts to be joined.
template <class T, int D, int kRowTile, bool kScore>
VP_DEVICE void stream(const StreamArgs& args) {
  constexpr int kRows = kWarpRows<T, kRowTile>;
  using S = Stream<T, D, kRows, kScore>;
  using Tile = typename S::Tile;
  VP_SHARED(shared);
  wait_for_previous();
  const Share share = share_of(args);
  if (share.split >= share.splits) return;
  const int32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, teams = warps / args.team;
  const int32_t group_head = share.g * args.group;  // the first of all H
  const T* q =
      static_cast<const T*>(args.q) + share.b * args.q_stride.row + group_head * args.q_stride.head;
  VP_UNROLL_1 for (int32_t first = 0; first < args.team * kRows; first += kRows) {
    Tile::load_query(shared + first / kRows * Tile::kQueryBytes, [&](int row, int d) {
      const int32_t head = first + row;
      return head < args.group && d < args.head_dim ? q[head * args.q_stride.head + d] : T{};
    });
  }
  __syncthreads();

  const int32_t own_bytes = Tile::kWeightBytes + args.stages * stage_extra_bytes(Tile::kKeys);
  const int32_t stage_bytes = args.stages * (args.k_bytes + args.v_bytes);
  auto* own = reinterpret_cast<char*>(shared) + args.team * Tile::kQueryBytes;
  char* stages = own + warps * own_bytes;
  S part(args, share);
  part.team = warp / args.team;
  part.member = warp % args.team;
  part.first_head = group_head + part.member * kRows;
  part.heads = args.group - part.member * kRows;
  part.query = shared + part.member * Tile::kQueryBytes;
  part.weights = own + warp * own_bytes;
  char* leader = own + part.team * args.team * own_bytes;
  part.landings = reinterpret_cast<Landing*>(leader + Tile::kWeightBytes);
  part.places = reinterpret_cast<int32_t*>(part.landings + args.stages);
  part.stages = stages + part.team * stage_bytes;
  part.run(teams);

  let_next_start();
  copy_wait<0>();
  __syncthreads();  // the stages are free
  auto* stats = reinterpret_cast<float*>(stages);
  float* sums = stats + warps * kRows * kPartStats;
  part.drain_stats(stats + warp * kRows * kPartStats);
  if (args.v_bytes) part.tile.drain(sums + warp * Tile::kParts * kRows * D);
  __syncthreads();
  finish<T, D, kRows, Tile::kParts, kScore>(args, share, stats, sums, teams);
}

template <class T, int D, int kRowTile>
constexpr StreamKernel describe(const void* function, const char* name) {
  constexpr int kRows = kWarpRows<T, kRowTile>;
  using Tile = TileOf<T, D, kRows>;
  return {function,
          name,
          Tile::kKeys,
          kRowTile,
          kRows,
          D,
          Tile::kQueryBytes,
          Tile::kWeightBytes,
          Tile::kKeys * Tile::kRowBytes,
          Tile::kInPlace,
          kRows * (kPartStats + Tile::kParts * D) * 4};
}

}  // namespace visionpulse::cuda
