// SPDX-License-Identifier: Apache-2.0
// Joining parts of a softmax in a fixed order: the warps of a block, then the splits of a row.
#pragma once

#include "kernels/common/softmax.h"
#include "kernels/cuda/last.cuh"
#include "kernels/cuda/row.cuh"

namespace visionpulse::cuda {

// How much a part's sums count under the common maximum.
VP_DEVICE float part_factor(float m, float top, float inverse_tau) {
  return fast_exp2(rescale_exponent(m, top) * inverse_tau);
}

// Calls `use(i, load(i), true)` for 0 <= i < count in ascending order, with kFlight loads under way
// at a time: the order of the uses, and so the bits of a sum, are those of a plain loop. Nothing
// here may branch between two loads: the compiler would move the later one down to its use, one
// trip to L2 each. So the remainder repeats the last load, and its surplus uses get `false`.
constexpr int kFlight = 8;

template <class Load, class Use>
VP_DEVICE void load_ahead(int count, Load load, Use use) {
  decltype(load(0)) value[kFlight];
  int done = 0;
  VP_UNROLL_1 for (; done + kFlight <= count; done += kFlight) {
    VP_UNROLL for (int u = 0; u < kFlight; ++u) value[u] = load(done + u);
    VP_UNROLL for (int u = 0; u < kFlight; ++u) use(done + u, value[u], true);
  }
  if (done >= count) return;
  const auto at = [&](int u) { return done + u < count ? done + u : count - 1; };
  VP_UNROLL for (int u = 0; u < kFlight - 1; ++u) value[u] = load(at(u));
  VP_UNROLL for (int u = 0; u < kFlight - 1; ++u) use(at(u), value[u], done + u < count);
}

struct Joined {
  float m, l, l_tau, l_visual;
};

// `stats` holds kPartStats numbers per part, `stride` floats apart.
template <bool kScore>
VP_DEVICE Joined join(const float* stats, int parts, int stride, float inverse_tau) {
  Joined all = {minus_infinity(), 0.0f, 0.0f, 0.0f};
  for (int p = 0; p < parts; ++p) all.m = fmaxf(all.m, stats[p * stride]);
  for (int p = 0; p < parts; ++p) {
    const float* part = stats + p * stride;
    all.l += part[1] * part_factor(part[0], all.m, 1.0f);
    if (kScore) {
      const float factor = part_factor(part[0], all.m, inverse_tau);
      all.l_tau += part[2] * factor;
      all.l_visual += part[3] * factor;
    }
  }
  return all;
}

VP_DEVICE float log2_sum(float m, float sum) {
  // without keys every probability is 0, which +inf here makes it
  return sum == 0.0f ? -minus_infinity() : m + precise_log2(sum);
}

// The final numbers of one head of a row.
VP_DEVICE void write_head_stats(const StreamArgs& args, const Share& share, int row,
                                const Joined& all) {
  const int64_t head = static_cast<int64_t>(share.b) * args.heads + share.g * args.group + row;
  float* to = args.stats + head * kHeadStats;
  to[0] = log2_sum(all.m, all.l);
  to[1] = log2_sum(all.m * args.inverse_tau, all.l_tau);
  to[2] = all.l_tau == 0.0f ? 0.0f : all.l_visual / all.l_tau;
}

template <class T>
VP_DEVICE void write_output(const StreamArgs& args, const Share& share, int row, int d, float sum,
                            float l) {
  if (d >= args.head_dim) return;
  T* to = static_cast<T*>(args.out) + share.b * args.out_stride.row;
  to[(share.g * args.group + row) * args.out_stride.head + d] =
      Element<T>::store(l == 0.0f ? 0.0f : sum / l);
}

// The row and KV head of a block, among all of them.
VP_DEVICE int64_t place_of(const Share& share) {
  return static_cast<int64_t>(share.b) * gridDim.y + share.g;
}

// Joins the splits of a row, of `rows` heads each; runs in one block.
template <class T, int D, bool kScore>
VP_DEVICE void merge_splits(const StreamArgs& args, const Share& share, int rows, float* shared) {
  const int64_t first = place_of(share) * args.max_splits;
  const int stride = rows * kPartStats;
  static_assert(kPartStats == 4, "one float4 is the state of one head");
  const auto* stats = reinterpret_cast<const float4*>(args.part_stats + first * stride);
  auto* held = reinterpret_cast<float4*>(shared);
  const int own = threadIdx.x, heads = share.splits * rows, threads = blockDim.x;
  load_ahead(
      own < heads ? (heads - own + threads - 1) / threads : 0,
      [&](int i) { return load_fresh(stats + own + i * threads); },
      [&](int i, float4 one, bool) { held[own + i * threads] = one; });
  __syncthreads();
  if (kScore && static_cast<int>(threadIdx.x) < args.group) {
    const int row = threadIdx.x;
    write_head_stats(
        args, share, row,
        join<kScore>(shared + row * kPartStats, share.splits, stride, args.inverse_tau));
  }
  if (!args.v_bytes) return;
  __syncthreads();
  float* l = shared + share.splits * stride;
  for (int row = threadIdx.x; row < args.group; row += blockDim.x) {
    const Joined all =
        join<false>(shared + row * kPartStats, share.splits, stride, args.inverse_tau);
    l[row] = all.l;
    for (int s = 0; s < share.splits; ++s) {
      float* part = shared + s * stride + row * kPartStats;
      part[1] = part_factor(part[0], all.m, 1.0f);
    }
  }
  __syncthreads();
  // Four columns a thread: the wider the load, the fewer trips to L2.
  constexpr int kWide = 4, kColumns = D / kWide;
  for (int i = threadIdx.x; i < args.group * kColumns; i += blockDim.x) {
    const int row = i / kColumns, d = i % kColumns * kWide;
    const float* from = args.part_out + (first * rows + row) * D + d;
    const float* weights = shared + row * kPartStats + 1;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    load_ahead(
        share.splits,
        [&](int s) {
          return load_fresh(
              reinterpret_cast<const float4*>(from + static_cast<int64_t>(s) * rows * D));
        },
        [&](int s, float4 part, bool counts) {
          const float weight = weights[s * stride];
          const auto add = [&](float& to, float x) { to = counts ? to + x * weight : to; };
          add(sum.x, part.x), add(sum.y, part.y), add(sum.z, part.z), add(sum.w, part.w);
        });
    write_output<T>(args, share, row, d, sum.x, l[row]);
    write_output<T>(args, share, row, d + 1, sum.y, l[row]);
    write_output<T>(args, share, row, d + 2, sum.z, l[row]);
    write_output<T>(args, share, row, d + 3, sum.w, l[row]);
  }
}

// Joins the teams of a block, [team][row][kPartStats] and [team][warp][part][row][D], and writes
// the result or hands it to the block that comes last.
template <class T, int D, int kRows, int kParts, bool kScore>
VP_DEVICE void finish(const StreamArgs& args, const Share& share, float* stats, const float* sums,
                      int teams) {
  const int rows = args.team * kRows, stride = rows * kPartStats;
  const int64_t part = place_of(share) * args.max_splits + share.split;
  const bool alone = share.splits == 1;
  for (int row = threadIdx.x; row < args.group; row += blockDim.x) {
    const Joined all = join<kScore>(stats + row * kPartStats, teams, stride, args.inverse_tau);
    if (alone) {
      if (kScore) write_head_stats(args, share, row, all);
    } else {
      float* to = args.part_stats + part * stride + row * kPartStats;
      to[0] = all.m, to[1] = all.l, to[2] = all.l_tau, to[3] = all.l_visual;
    }
  }
  if (args.v_bytes) {
    for (int i = threadIdx.x; i < args.group * D; i += blockDim.x) {
      const int row = i / D;
      const Joined all = join<false>(stats + row * kPartStats, teams, stride, 1.0f);
      float sum = 0.0f;
      for (int team = 0; team < teams; ++team) {
        const float factor = part_factor(stats[team * stride + row * kPartStats], all.m, 1.0f);
        const int warp = team * args.team + row / kRows;
        const float* from = sums + (warp * kParts * kRows + row % kRows) * D + i % D;
        VP_UNROLL for (int p = 0; p < kParts; ++p) sum += from[p * kRows * D] * factor;
      }
      if (alone) {
        write_output<T>(args, share, row, i % D, sum, all.l);
      } else {
        args.part_out[(part * rows + row) * D + i % D] = sum;
      }
    }
  }
  auto* flag = reinterpret_cast<uint32_t*>(stats);
  if (alone || !came_last(args.counters + place_of(share), share.splits, flag)) return;
  merge_splits<T, D, kScore>(args, share, rows, stats);
}

}  // namespace visionpulse::cuda
