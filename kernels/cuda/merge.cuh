// SPDX-License-Identifier: Apache-2.0
// Merges the parts of a softmax in a fixed order: the teams of a block, then the splits of a row.
#pragma once

#include "kernels/common/softmax.h"
#include "kernels/cuda/arrival.cuh"
#include "kernels/cuda/shared_layout.h"
#include "kernels/cuda/work.cuh"

namespace visionpulse::cuda {

// What a part's sums are multiplied by to count under the common maximum.
VP_DEVICE float part_factor(float m, float top, float inverse_tau) {
  return fast_exp2(rescale_exponent(m, top) * inverse_tau);
}

// Calls `use(i, load(i), true)` for 0 <= i < count in ascending order, with kLoadsAhead loads in
// flight: the order of the uses, and so the bits of a sum, are those of a plain loop. Nothing here
// may branch between two loads: the compiler would move the later one down to its use, one trip to
// L2 each. So the remainder repeats the last load, and its surplus uses get `false`.
constexpr int kLoadsAhead = 8;

template <class Load, class Use>
VP_DEVICE void load_ahead(int count, Load load, Use use) {
  decltype(load(0)) value[kLoadsAhead];
  int done = 0;
  VP_UNROLL_1 for (; done + kLoadsAhead <= count; done += kLoadsAhead) {
    VP_UNROLL for (int u = 0; u < kLoadsAhead; ++u) value[u] = load(done + u);
    VP_UNROLL for (int u = 0; u < kLoadsAhead; ++u) use(done + u, value[u], true);
  }
  if (done >= count) return;
  const auto at = [&](int u) { return done + u < count ? done + u : count - 1; };
  VP_UNROLL for (int u = 0; u < kLoadsAhead - 1; ++u) value[u] = load(at(u));
  VP_UNROLL for (int u = 0; u < kLoadsAhead - 1; ++u) use(at(u), value[u], done + u < count);
}

// The state of a head over several parts.
struct MergedStats {
  float m, l, l_tau, l_visual;
};

// `stats` holds kPartStats numbers for each part, `stride` floats apart.
template <bool kScore>
VP_DEVICE MergedStats merge_stats(const float* stats, int parts, int stride, float inverse_tau) {
  MergedStats all = {minus_infinity(), 0.0f, 0.0f, 0.0f};
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

// The final statistics of one head of the group.
VP_DEVICE void write_head_stats(const StreamArgs& args, const WorkRange& work, int head,
                                const MergedStats& all) {
  const int64_t of_all = static_cast<int64_t>(work.b) * args.heads + work.g * args.group + head;
  float* to = args.stats + of_all * kHeadStats;
  to[0] = log2_sum(all.m, all.l);
  to[1] = log2_sum(all.m * args.inverse_tau, all.l_tau);
  to[2] = all.l_tau == 0.0f ? 0.0f : all.l_visual / all.l_tau;
}

template <class T>
VP_DEVICE void write_output(const StreamArgs& args, const WorkRange& work, int head, int d,
                            float sum, float l) {
  if (d >= args.head_dim) return;
  T* to = static_cast<T*>(args.out) + work.b * args.out_stride.row;
  to[(work.g * args.group + head) * args.out_stride.head + d] =
      Element<T>::store(l == 0.0f ? 0.0f : sum / l);
}

// Merges the splits of a row, each of `heads` heads, padding included; runs in one block.
template <class T, int D, bool kScore>
VP_DEVICE void merge_splits(const StreamArgs& args, const WorkRange& work, int heads,
                            float* shared) {
  const int64_t first = kv_head_index(work) * args.max_splits;
  const int stride = heads * kPartStats;
  static_assert(kPartStats == 4, "one float4 is the state of one head");
  const auto* stats = reinterpret_cast<const float4*>(args.part_stats + first * stride);
  auto* held = reinterpret_cast<float4*>(shared);
  const int own = threadIdx.x, states = work.splits * heads, threads = blockDim.x;
  load_ahead(
      own < states ? (states - own + threads - 1) / threads : 0,
      [&](int i) { return load_fresh(stats + own + i * threads); },
      [&](int i, float4 state, bool) { held[own + i * threads] = state; });
  __syncthreads();
  if (kScore && static_cast<int>(threadIdx.x) < args.group) {
    const int head = threadIdx.x;
    write_head_stats(
        args, work, head,
        merge_stats<kScore>(shared + head * kPartStats, work.splits, stride, args.inverse_tau));
  }
  if (!args.v_bytes) return;
  __syncthreads();
  float* l = shared + merge_stats_floats(work.splits, heads);
  for (int head = threadIdx.x; head < args.group; head += blockDim.x) {
    const MergedStats all =
        merge_stats<false>(shared + head * kPartStats, work.splits, stride, args.inverse_tau);
    l[head] = all.l;
    for (int s = 0; s < work.splits; ++s) {
      float* part = shared + s * stride + head * kPartStats;
      part[1] = part_factor(part[0], all.m, 1.0f);
    }
  }
  __syncthreads();
  // Four columns a thread: the wider the load, the fewer trips to L2.
  constexpr int kWide = 4, kColumns = D / kWide;
  for (int i = threadIdx.x; i < args.group * kColumns; i += blockDim.x) {
    const int head = i / kColumns, d = i % kColumns * kWide;
    const float* from = args.part_out + (first * heads + head) * D + d;
    const float* factors = shared + head * kPartStats + 1;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    load_ahead(
        work.splits,
        [&](int s) {
          return load_fresh(
              reinterpret_cast<const float4*>(from + static_cast<int64_t>(s) * heads * D));
        },
        [&](int s, float4 part, bool counts) {
          const float factor = factors[s * stride];
          const auto add = [&](float& to, float x) { to = counts ? to + x * factor : to; };
          add(sum.x, part.x), add(sum.y, part.y), add(sum.z, part.z), add(sum.w, part.w);
        });
    write_output<T>(args, work, head, d, sum.x, l[head]);
    write_output<T>(args, work, head, d + 1, sum.y, l[head]);
    write_output<T>(args, work, head, d + 2, sum.z, l[head]);
    write_output<T>(args, work, head, d + 3, sum.w, l[head]);
  }
}

// Merges the teams of a block, from [team][head][kPartStats] and [team][warp][part][head][D], and
// writes the result, or leaves it to the block that arrives last.
template <class T, int D, int kHeads, int kParts, bool kScore>
VP_DEVICE void merge_teams(const StreamArgs& args, const WorkRange& work, float* stats,
                           const float* sums, int teams) {
  const int heads = args.team * kHeads, stride = heads * kPartStats;
  const int64_t part = kv_head_index(work) * args.max_splits + work.split;
  const bool alone = work.splits == 1;
  for (int head = threadIdx.x; head < args.group; head += blockDim.x) {
    const MergedStats all =
        merge_stats<kScore>(stats + head * kPartStats, teams, stride, args.inverse_tau);
    if (alone) {
      if (kScore) write_head_stats(args, work, head, all);
    } else {
      float* to = args.part_stats + part * stride + head * kPartStats;
      to[0] = all.m, to[1] = all.l, to[2] = all.l_tau, to[3] = all.l_visual;
    }
  }
  if (args.v_bytes) {
    for (int i = threadIdx.x; i < args.group * D; i += blockDim.x) {
      const int head = i / D;
      const MergedStats all = merge_stats<false>(stats + head * kPartStats, teams, stride, 1.0f);
      float sum = 0.0f;
      for (int team = 0; team < teams; ++team) {
        const float factor = part_factor(stats[team * stride + head * kPartStats], all.m, 1.0f);
        const int warp = team * args.team + head / kHeads;
        const float* from = sums + (warp * kParts * kHeads + head % kHeads) * D + i % D;
        VP_UNROLL for (int p = 0; p < kParts; ++p) sum += from[p * kHeads * D] * factor;
      }
      if (alone) {
        write_output<T>(args, work, head, i % D, sum, all.l);
      } else {
        args.part_out[(part * heads + head) * D + i % D] = sum;
      }
    }
  }
  auto* flag = reinterpret_cast<uint32_t*>(stats);
  if (alone || !arrived_last(args.counters + kv_head_index(work), work.splits, flag)) return;
  merge_splits<T, D, kScore>(args, work, heads, stats);
}

}  // namespace visionpulse::cuda
