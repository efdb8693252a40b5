// SPDX-License-Identifier: Apache-2.0
// Joining parts of a softmax in a fixed order: the warps of a block, then the splits of a row.
#pragma once

#include "kernels/common/softmax.h"
#include "kernels/cuda/row.cuh"

namespace visionpulse::cuda {

// How much a part's sums count under the common maximum.
VP_DEVICE float part_factor(float m, float top, float inverse_tau) {
  return fast_exp2(rescale_exponent(m, top) * inverse_tau);
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
  const int64_t head = static_cast<int64_t>(share.b) * args.heads + share.first_head + row;
  float* to = args.stats + head * kHeadStats;
  to[0] = log2_sum(all.m, all.l);
  to[1] = log2_sum(all.m * args.inverse_tau, all.l_tau);
  to[2] = all.l_tau == 0.0f ? 0.0f : all.l_visual / all.l_tau;
}

template <class T>
VP_DEVICE void write_output(const StreamArgs& args, const Share& share, int row, int d, float sum,
                            float l) {
  if (d >= args.head_dim) return;
  T* to = static_cast<T*>(args.out) + share.b * args.out_row;
  to[(share.first_head + row) * args.out_head + d] = Element<T>::store(l == 0.0f ? 0.0f : sum / l);
}

// Joins the splits of a row; runs in one block.
template <class T, int D, int kRows, bool kScore>
VP_DEVICE void merge_splits(const StreamArgs& args, const Share& share, float* shared) {
  const int64_t row_block = static_cast<int64_t>(share.b) * gridDim.y + share.block;
  const int64_t first = row_block * args.max_splits;
  constexpr int kStats = kRows * kPartStats;
  // all statistics at once: one by one each would be a trip to memory
  for (int i = threadIdx.x; i < share.splits * kStats; i += blockDim.x) {
    shared[i] = load_fresh(args.part_stats + first * kStats + i);
  }
  __syncthreads();
  if (kScore && static_cast<int>(threadIdx.x) < share.heads) {
    const int row = threadIdx.x;
    write_head_stats(
        args, share, row,
        join<kScore>(shared + row * kPartStats, share.splits, kStats, args.inverse_tau));
  }
  if (!args.v_bytes) return;
  __syncthreads();
  float* l = shared + share.splits * kStats;
  for (int row = threadIdx.x; row < share.heads; row += blockDim.x) {
    const Joined all =
        join<false>(shared + row * kPartStats, share.splits, kStats, args.inverse_tau);
    l[row] = all.l;
    for (int s = 0; s < share.splits; ++s) {
      float* part = shared + s * kStats + row * kPartStats;
      part[1] = part_factor(part[0], all.m, 1.0f);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < share.heads * D; i += blockDim.x) {
    const int row = i / D;
    const float* from = args.part_out + (first * kRows + row) * D + i % D;
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < share.splits; ++s) {
      sum += load_fresh(from + static_cast<int64_t>(s) * kRows * D) *
             shared[s * kStats + row * kPartStats + 1];
    }
    write_output<T>(args, share, row, i % D, sum, l[row]);
  }
}

// True in the block of a row that comes last. The counter wraps to 0, ready for the next launch.
VP_DEVICE bool came_last(const StreamArgs& args, const Share& share, float* shared) {
  memory_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int64_t row_block = static_cast<int64_t>(share.b) * gridDim.y + share.block;
    const auto last = static_cast<unsigned>(share.splits - 1);
    shared[0] = atomicInc(args.counters + row_block, last) == last ? 1.0f : 0.0f;
  }
  __syncthreads();
  const bool mine = shared[0] != 0.0f;
  __syncthreads();
  memory_fence();
  return mine;
}

// Joins the warps of a block, [warp][row][kPartStats] and [warp][part][row][D], and writes the
// result or hands it to the block that comes last.
template <class T, int D, int kRows, int kParts, bool kScore>
VP_DEVICE void finish(const StreamArgs& args, const Share& share, float* stats, const float* sums,
                      int warps) {
  constexpr int kStats = kRows * kPartStats;
  const int64_t part =
      (static_cast<int64_t>(share.b) * gridDim.y + share.block) * args.max_splits + share.split;
  const bool alone = share.splits == 1;
  for (int row = threadIdx.x; row < share.heads; row += blockDim.x) {
    const Joined all = join<kScore>(stats + row * kPartStats, warps, kStats, args.inverse_tau);
    if (alone) {
      if (kScore) write_head_stats(args, share, row, all);
    } else {
      float* to = args.part_stats + part * kStats + row * kPartStats;
      to[0] = all.m, to[1] = all.l, to[2] = all.l_tau, to[3] = all.l_visual;
    }
  }
  if (args.v_bytes) {
    for (int i = threadIdx.x; i < share.heads * D; i += blockDim.x) {
      const int row = i / D;
      const Joined all = join<false>(stats + row * kPartStats, warps, kStats, 1.0f);
      float sum = 0.0f;
      for (int w = 0; w < warps; ++w) {
        const float factor = part_factor(stats[w * kStats + row * kPartStats], all.m, 1.0f);
        VP_UNROLL for (int p = 0; p < kParts; ++p) {
          sum += sums[((w * kParts + p) * kRows + row) * D + i % D] * factor;
        }
      }
      if (alone) {
        write_output<T>(args, share, row, i % D, sum, all.l);
      } else {
        args.part_out[(part * kRows + row) * D + i % D] = sum;
      }
    }
  }
  if (alone || !came_last(args, share, stats)) return;
  merge_splits<T, D, kRows, kScore>(args, share, stats);
}

}  // namespace visionpulse::cuda
