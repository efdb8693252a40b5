// SPDX-License-Identifier: Apache-2.0
// Merges the parts of a softmax in a fixed order: the teams of a block, then the splits of a row,
// at once or by groups.
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

// Four columns of a head's sums: the wider the load, the fewer trips to L2.
constexpr int kWide = 4;

template <class T, bool kSeveral>
VP_DEVICE void write_outputs(const StreamArgs& args, const WorkRange& work,
                             const QueryHeads<kSeveral>& heads, int head, int d, const float4& sum,
                             float l, float v_scale) {
  using Query = typename KindOf<T>::Query;
  if constexpr (kSeveral) {
    // One column after another: what is computed for all would take registers from the stream.
    const auto write = [&](int at, float x) {
      if (at >= args.head_dim) return;
      Query* to = heads.base(static_cast<Query*>(args.out), args.out_stride);
      to[heads.offset(head, args.out_stride, args.queries.out_stride) + at] =
          stored<Query>(args, x);
    };
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    if (l != 0.0f) {
      x = float4{sum.x / l * v_scale, sum.y / l * v_scale, sum.z / l * v_scale,
                 sum.w / l * v_scale};
    }
    write(d, x.x), write(d + 1, x.y), write(d + 2, x.z), write(d + 3, x.w);
  } else {
    const float scale = reciprocal(l) * v_scale;
    const float x[kWide] = {sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale};
    Query* to = static_cast<Query*>(args.out) + work.b * args.out_stride.row +
                (work.g * args.group + head) * args.out_stride.head;
    VP_UNROLL for (int u = 0; u < kWide; ++u) {
      const Query y = stored<Query>(args, l == 0.0f ? 0.0f : x[u]);
      if (d + u < args.head_dim) to[d + u] = y;
    }
  }
}

VP_DEVICE void add_scaled(float4& sum, const float4& part, float factor) {
  sum.x += part.x * factor, sum.y += part.y * factor;
  sum.z += part.z * factor, sum.w += part.w * factor;
}

// Parts of a row that one block merges, by their place among its splits.
struct Parts {
  int32_t first, apart, count;
  bool all;  // of the row: what they make is the result; else it takes the place of the first
};

// The parts that a block is the last to arrive of: all, or first those of its group.
VP_DEVICE Parts first_parts(const MergeRule& rule, const WorkRange& work) {
  if (work.splits <= rule.at_once) return {0, 1, work.splits, true};
  const int32_t first = work.split / rule.fan * rule.fan, left = work.splits - first;
  return {first, 1, left < rule.fan ? left : rule.fan, false};
}
VP_DEVICE Parts merged_groups(const MergeRule& rule, const WorkRange& work) {
  return {0, rule.fan, (work.splits + rule.fan - 1) / rule.fan, true};
}

// Behind the counters of all KV heads lie those of their groups.
VP_DEVICE uint32_t* counter_of(const StreamArgs& args, const WorkRange& work, const Parts& parts) {
  const uint32_t head = work.b * gridDim.y + blockIdx.y;
  if (parts.all) return args.counters + head;
  return args.counters + gridDim.y * gridDim.z + head * kMostGroups + parts.first / args.merge.fan;
}

// Brings the sums of all parts through shared memory, for one output of a thread after another: in
// steps of kSplitsAhead parts, and in two batches of some steps, of which one is under way while
// the other is used. A thread reads what it has copied itself, so no thread waits for another.
struct SumCopies {
  static constexpr int kStep = kSplitsAhead * kThreadsPerWarp;  // slots of a warp
  const float* sums;                                            // of the first part, [head][D]
  float4* slots;  // shared, of this thread: [batch][step][part], the warp's others between
  int32_t pitch;  // floats from a part to the next
  int32_t parts, outputs, steps;
  int32_t output, part;          // that are copied next
  const float* from;             // their sums
  int32_t used = 0, refill = 0;  // batches
  int32_t left = 0;              // steps of the batch in use
  const float4* next = nullptr;

  __device__ __forceinline__ void copy_batch() {
    float4* to = slots + refill * steps * kStep;
    VP_UNROLL_1 for (int s = 0; s < steps && output < outputs; ++s, to += kStep) {
      VP_UNROLL for (int u = 0; u < kSplitsAhead; ++u, from += pitch) {
        copy_fresh(to + u * kThreadsPerWarp, from, part + u < parts ? 16 : 0);
      }
      part += kSplitsAhead;
      if (part >= parts) part = 0, output += blockDim.x, from = sums + output * kWide;
    }
    copy_commit();
    refill ^= 1;
  }
  // Waits for the batch that was copied first.
  __device__ __forceinline__ void wait_for_batch() {
    copy_wait<1>();
    left = steps, next = slots + used * steps * kStep;
    used ^= 1;
  }
  // The parts of the next step, with zeros behind the last.
  __device__ __forceinline__ const float4* next_step() {
    if (left == 0) copy_batch(), wait_for_batch();
    --left, next += kStep;
    return next - kStep;
  }
};

// Merges parts of a row, each of all heads, padding included; runs in one block. They are added in
// ascending order, so the bits of a sum are those of a plain loop.
template <class T, int D, int kHeads, bool kScore, bool kSeveral>
VP_DEVICE void merge_parts(const StreamArgs& args, const WorkRange& work,
                           const QueryHeads<kSeveral>& own_heads, const Parts& parts, float* shared,
                           float v_scale) {
  static_assert(kPartStats == 4, "one float4 is the state of one head");
  constexpr int kColumns = D / kWide;
  const int own = kSeveral ? from_here_on(threadIdx.x) : threadIdx.x;
  const int threads = blockDim.x, count = parts.count;
  const int heads = args.team * kHeads;
  const int64_t first = kv_head_index(work) * args.max_splits + parts.first;
  auto* stats = reinterpret_cast<float4*>(args.part_stats) + first * heads;
  float* sums = args.part_out + first * heads * D;
  const int outputs = args.v_bytes ? own_heads.count() * kColumns : 0;
  auto* held = reinterpret_cast<float4*>(shared);
  float* tops = shared + merge_stats_floats(count, heads);  // [warp][head]
  // All states of a thread are of one head, since the heads are a power of two.
  const int own_head = own & (heads - 1), states = count * heads;
  const int padded = padded_splits(count) * heads;
  const float4 nothing = {minus_infinity(), 0.0f, 0.0f, 0.0f};
  const int first_part = own / kHeads >> args.team_log2;
  const float4* from = stats + first_part * parts.apart * heads + own_head;
  const int ahead = (threads / kHeads >> args.team_log2) * parts.apart * heads;
  VP_UNROLL_1 for (int i = own; i < padded; i += threads, from += ahead) {
    if (i < states) copy_fresh(held + i, from, 16);
    if (i >= states) held[i] = nothing;
  }
  copy_commit();
  const int steps = args.merge.steps;
  auto* slots = reinterpret_cast<float4*>(shared + merge_floats(count, heads)) + lane_id() +
                own / kThreadsPerWarp * (2 * steps * SumCopies::kStep);
  SumCopies copies = {sums, slots, parts.apart * heads * D, count, outputs, steps,
                      own,  0,     sums + own * kWide};
  copies.copy_batch();  // they need no state
  copies.copy_batch();
  copy_wait<2>();
  float top = minus_infinity();
  VP_UNROLL_1 for (int i = own; i < states; i += 2 * threads) {
    const int j = i + threads < states ? i + threads : i;
    top = fmaxf(top, fmaxf(held[i].x, held[j].x));
  }
  VP_UNROLL_1 for (int bit = heads; bit < kThreadsPerWarp; bit *= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, bit));
  }
  if constexpr (kSeveral) {  // of 64 heads a warp saw those of its threads' numbers alone
    VP_UNROLL_1 for (int h = lane_id(); h < heads; h += kThreadsPerWarp) {
      tops[own / kThreadsPerWarp * heads + h] = h == own_head ? top : minus_infinity();
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
  // What each part counts with, and its sums times that, once for all columns.
  const float top_of_head = top_of(own_head);
  const auto counted = [&](const float4& state) {
    const float factor = part_factor(state.x, top_of_head, 1.0f),
                tau = kScore ? part_factor(state.x, top_of_head, args.inverse_tau) : 0.0f;
    return float4{factor, state.y * factor, state.z * tau, state.w * tau};
  };
  VP_UNROLL_1 for (int i = own; i < padded; i += 2 * threads) {
    const int j = i + threads < padded ? i + threads : i;
    const float4 a = counted(held[i]), b = counted(held[j]);
    held[i] = a, held[j] = b;
  }
  __syncthreads();
  if ((kScore || !parts.all) && own < own_heads.count()) {
    MergedStats all = {top_of_head, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int s = 0; s < count; ++s) {
      const float4 part = held[s * heads + own];
      all.l += part.y, all.l_tau += part.z, all.l_visual += part.w;
    }
    if (!parts.all) {
      stats[own] = float4{all.m, all.l, all.l_tau, all.l_visual};
    } else if (kScore) {
      write_head_stats(args, work, own_heads, own, all);
    }
  }
  copies.wait_for_batch();
  VP_UNROLL_1 for (int i = own; i < outputs; i += threads) {
    const float4* part_of_head = held + i / kColumns;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    float l = 0.0f;
    VP_UNROLL_1 for (int done = 0; done < count; done += kSplitsAhead) {
      const float4* x = copies.next_step();
      VP_UNROLL for (int u = 0; u < kSplitsAhead; ++u, part_of_head += heads) {
        add_scaled(sum, x[u * kThreadsPerWarp], part_of_head->x);
        l += part_of_head->y;
      }
    }
    if (parts.all) {
      write_outputs<T>(args, work, own_heads, i / kColumns, i % kColumns * kWide, sum, l, v_scale);
    } else {
      reinterpret_cast<float4*>(sums)[i] = sum;
    }
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
  if (alone) return;
  auto* flag = reinterpret_cast<uint32_t*>(stats);
  Parts parts = first_parts(args.merge, work);
  VP_UNROLL_1 while (arrived_last(counter_of(args, work, parts), parts.count, flag)) {
    merge_parts<T, D, kHeads, kScore>(args, work, own, parts, stats, v_scale);
    if (parts.all) return;
    parts = merged_groups(args.merge, work);
  }
}

}  // namespace visionpulse::cuda
