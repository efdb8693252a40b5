// SPDX-License-Identifier: Apache-2.0
// Merges the parts of a softmax in a fixed order: the teams of a block, then the splits of a row.
#pragma once

#include "kernels/common/softmax.h"
#include "kernels/cuda/arrival.cuh"
#include "kernels/cuda/kinds.cuh"
#include "kernels/cuda/query_heads.cuh"
#include "kernels/cuda/shared_layout.h"
#include "kernels/cuda/work.cuh"

namespace visionpulse::cuda {

// What a part's sums are multiplied by to count under the common maximum.
VP_DEVICE float part_factor(float m, float top, float inverse_tau) {
  return fast_exp2(rescale_exponent(m, top) * inverse_tau);
}

// The state of a head over several parts.
struct MergedStats {
  float m, l, l_tau, l_visual;
};

VP_DEVICE void add_part(MergedStats& all, const float4& part, float factor, float factor_tau) {
  all.l += part.y * factor;
  all.l_tau += part.z * factor_tau;
  all.l_visual += part.w * factor_tau;
}

VP_DEVICE float log2_sum(float m, float sum) {
  // without keys every probability is 0, which +inf here makes it
  return sum == 0.0f ? -minus_infinity() : m + precise_log2(sum);
}

// The final statistics of one head of the block.
template <bool kSeveral>
VP_DEVICE void write_head_stats(const StreamArgs& args, const WorkRange& work,
                                const QueryHeads<kSeveral>& heads, int head,
                                const MergedStats& all) {
  float* to = args.stats + heads.row_of(work.b, work.g, 0, head) * kHeadStats;
  to[0] = log2_sum(all.m, all.l);
  to[1] = log2_sum(all.m * args.inverse_tau, all.l_tau);
  to[2] = all.l_tau == 0.0f ? 0.0f : all.l_visual / all.l_tau;
}

template <class T, bool kSeveral>
VP_DEVICE void write_output(const StreamArgs& args, const WorkRange& work,
                            const QueryHeads<kSeveral>& heads, int head, int d, float x) {
  using Query = typename KindOf<T>::Query;
  if (d >= args.head_dim) return;
  if constexpr (kSeveral) {
    Query* to = heads.base(static_cast<Query*>(args.out), args.out_stride);
    to[heads.offset(head, args.out_stride, args.queries.out_stride) + d] = stored<Query>(args, x);
  } else {
    Query* to = static_cast<Query*>(args.out) + work.b * args.out_stride.row;
    to[(work.g * args.group + head) * args.out_stride.head + d] = stored<Query>(args, x);
  }
}

// Four columns of a head's sums: the wider the load, the fewer trips to L2.
constexpr int kWide = 4;

template <class T, bool kSeveral>
VP_DEVICE void write_outputs(const StreamArgs& args, const WorkRange& work,
                             const QueryHeads<kSeveral>& heads, int head, int d, const float4& sum,
                             float l, float v_scale) {
  float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
  if (l != 0.0f) {
    x = float4{sum.x / l * v_scale, sum.y / l * v_scale, sum.z / l * v_scale, sum.w / l * v_scale};
  }
  write_output<T>(args, work, heads, head, d, x.x);
  write_output<T>(args, work, heads, head, d + 1, x.y);
  write_output<T>(args, work, heads, head, d + 2, x.z);
  write_output<T>(args, work, heads, head, d + 3, x.w);
}

VP_DEVICE void add_scaled(float4& sum, const float4& part, float factor) {
  sum.x += part.x * factor, sum.y += part.y * factor;
  sum.z += part.z * factor, sum.w += part.w * factor;
}

// Loads in flight: of sums as many bytes as the path from L2 carries in one trip, of states those
// of a usual row. Nothing may branch between two of them: the compiler would move the later one
// down to its use, one trip to L2 each.
constexpr int kStatesAhead = 4;

// The sums of the splits from `split` on, four columns of one head.
VP_DEVICE void load_sums(float4 (&part)[kSplitsAhead], const float* from, int pitch, int split,
                         int splits) {
  VP_UNROLL for (int u = 0; u < kSplitsAhead; ++u) {
    const int64_t s = split + u;
    part[u] = load_fresh_if(s < splits, from + s * pitch);
  }
}

// Merges the splits of a row, each of `heads` heads, padding included; runs in one block. Splits
// are added in ascending order, so the bits of a sum are those of a plain loop.
template <class T, int D, bool kScore, bool kSeveral>
VP_DEVICE void merge_splits(const StreamArgs& args, const WorkRange& work,
                            const QueryHeads<kSeveral>& own_heads, int heads, float* shared,
                            float v_scale) {
  static_assert(kPartStats == 4, "one float4 is the state of one head");
  constexpr int kColumns = D / kWide;
  const int own = threadIdx.x, threads = blockDim.x, splits = work.splits, pitch = heads * D;
  const int64_t first = kv_head_index(work) * args.max_splits;
  const int outputs = args.v_bytes ? own_heads.count() * kColumns : 0;
  const auto sums_of = [&](int i) {
    return args.part_out + (first * heads + i / kColumns) * D + i % kColumns * kWide;
  };
  // All states of a thread are of one head, since the heads are a power of two.
  const float* stats = args.part_stats + first * heads * kPartStats;
  auto* held = reinterpret_cast<float4*>(shared);
  float* tops = shared + merge_stats_floats(splits, heads);  // [warp][head]
  const int states = splits * heads;
  float4 state[kStatesAhead], part[kSplitsAhead];
  const auto load_states = [&](int at) {
    VP_UNROLL for (int u = 0; u < kStatesAhead; ++u) {
      const int i = at + u * threads;
      state[u] = load_fresh_if(i < states, stats + i * kPartStats);
    }
  };
  load_states(own);
  load_sums(part, sums_of(own), pitch, 0, own < outputs ? splits : 0);  // they need no state
  float top = minus_infinity();
  const float4 nothing = {minus_infinity(), 0.0f, 0.0f, 0.0f};
  const int padded = padded_splits(splits) * heads;
  VP_UNROLL_1 for (int at = own;;) {
    VP_UNROLL for (int u = 0; u < kStatesAhead; ++u) {
      const int i = at + u * threads;
      if (i < padded) held[i] = i < states ? state[u] : nothing;
      if (i < states) top = fmaxf(top, state[u].x);
    }
    at += kStatesAhead * threads;
    if (at >= padded) break;
    load_states(at);
  }
  VP_UNROLL_1 for (int bit = heads; bit < kThreadsPerWarp; bit *= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, bit));
  }
  if constexpr (kSeveral) {  // of 64 heads a warp saw those of its threads' numbers alone
    VP_UNROLL_1 for (int h = lane_id(); h < heads; h += kThreadsPerWarp) {
      tops[own / kThreadsPerWarp * heads + h] = h == own % heads ? top : minus_infinity();
    }
  } else {
    if (lane_id() < heads) tops[own / kThreadsPerWarp * heads + lane_id()] = top;
  }
  __syncthreads();
  const auto top_of = [&](int head) {
    float of = tops[head];
    VP_UNROLL for (int w = 1; w < kMaxWarps; ++w) {
      if (w < threads / kThreadsPerWarp) of = fmaxf(of, tops[w * heads + head]);
    }
    return of;
  };
  if (kScore && own < own_heads.count()) {
    MergedStats all = {top_of(own), 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int s = 0; s < splits; ++s) {
      const float4 part = held[s * heads + own];
      add_part(all, part, part_factor(part.x, all.m, 1.0f),
               part_factor(part.x, all.m, args.inverse_tau));
    }
    write_head_stats(args, work, own_heads, own, all);
  }
  if constexpr (kSeveral) {  // what each split counts with, once for all columns of many heads
    __syncthreads();
    VP_UNROLL_1 for (int i = own; i < padded; i += threads) {
      const float factor = part_factor(held[i].x, top_of(own % heads), 1.0f);
      held[i].x = factor, held[i].y *= factor;
    }
    __syncthreads();
  }
  VP_UNROLL_1 for (int i = own; i < outputs; i += threads) {
    const float* from = sums_of(i);
    const float4* states_of_head = held + i / kColumns;
    const float top_of_head = kSeveral ? 0.0f : top_of(i / kColumns);
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    float l = 0.0f;
    if (i != own) load_sums(part, from, pitch, 0, splits);
    VP_UNROLL_1 for (int done = 0;;) {
      VP_UNROLL for (int u = 0; u < kSplitsAhead; ++u) {
        const float4 state = states_of_head[(done + u) * heads];
        const float factor = kSeveral ? state.x : part_factor(state.x, top_of_head, 1.0f);
        add_scaled(sum, part[u], factor);
        l += kSeveral ? state.y : state.y * factor;
      }
      done += kSplitsAhead;
      if (done >= splits) break;
      load_sums(part, from, pitch, done, splits);
    }
    write_outputs<T>(args, work, own_heads, i / kColumns, i % kColumns * kWide, sum, l, v_scale);
  }
}

// Merges the teams of a block, from [team][head][kPartStats] and [team][warp][part][head][D], and
// writes the result, or leaves it to the block that arrives last.
template <class T, int D, int kHeads, int kParts, bool kScore, bool kSeveral>
VP_DEVICE void merge_teams(const StreamArgs& args, const WorkRange& work,
                           const QueryHeads<kSeveral>& own, float* stats, const float* sums,
                           int teams, float v_scale) {
  constexpr int kColumns = D / kWide;
  const int heads = args.team * kHeads;
  const int64_t part = kv_head_index(work) * args.max_splits + work.split;
  const bool alone = work.splits == 1;
  const auto* states = reinterpret_cast<const float4*>(stats);
  const int items = args.v_bytes ? own.count() * kColumns : own.count();
  VP_UNROLL_1 for (int i = threadIdx.x; i < items; i += blockDim.x) {
    const int head = args.v_bytes ? i / kColumns : i, d = args.v_bytes ? i % kColumns * kWide : 0;
    float4 state[kMaxWarps];
    float factor[kMaxWarps];
    MergedStats all = {minus_infinity(), 0.0f, 0.0f, 0.0f};
    VP_UNROLL for (int t = 0; t < kMaxWarps; ++t) {
      if (t < teams) state[t] = states[t * heads + head];
    }
    VP_UNROLL for (int t = 0; t < kMaxWarps; ++t) {
      if (t < teams) all.m = fmaxf(all.m, state[t].x);
    }
    VP_UNROLL for (int t = 0; t < kMaxWarps; ++t) {
      if (t >= teams) continue;
      factor[t] = part_factor(state[t].x, all.m, 1.0f);
      add_part(all, state[t], factor[t],
               kScore ? part_factor(state[t].x, all.m, args.inverse_tau) : 0.0f);
    }
    if (d == 0) {
      if (!alone) {
        reinterpret_cast<float4*>(args.part_stats)[part * heads + head] =
            float4{all.m, all.l, all.l_tau, all.l_visual};
      } else if (kScore) {
        write_head_stats(args, work, own, head, all);
      }
    }
    if (!args.v_bytes) continue;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    VP_UNROLL for (int p = 0; p < kParts; ++p) {
      float4 x[kMaxWarps];
      VP_UNROLL for (int t = 0; t < kMaxWarps; ++t) {
        const int warp = t * args.team + head / kHeads;
        const int at = ((warp * kParts + p) * kHeads + head % kHeads) * D + d;
        if (t < teams) x[t] = *reinterpret_cast<const float4*>(sums + at);
      }
      VP_UNROLL for (int t = 0; t < kMaxWarps; ++t) {
        if (t < teams) add_scaled(sum, x[t], factor[t]);
      }
    }
    if (alone) {
      write_outputs<T>(args, work, own, head, d, sum, all.l, v_scale);
    } else {
      *reinterpret_cast<float4*>(args.part_out + (part * heads + head) * D + d) = sum;
    }
  }
  auto* flag = reinterpret_cast<uint32_t*>(stats);
  if (alone || !arrived_last(args.counters + kv_head_index(work), work.splits, flag)) return;
  merge_splits<T, D, kScore>(args, work, own, heads, stats, v_scale);
}

}  // namespace visionpulse::cuda
