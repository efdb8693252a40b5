// SPDX-License-Identifier: Apache-2.0
// Budget and exact top-K of a row: K from the mass, the K-th largest score by a radix select over
// ordered keys (11, 11 and 10 bits), then the kept positions in ascending order by counting. A row
// is served by a cluster of blocks that add up their histograms in distributed shared memory, or,
// where the chip has no clusters, by one block. Ties go to the lowest position: what lies before a
// candidate is counted in index order, never raced for.
#include "kernels/common/budget.h"
#include "kernels/common/keys.h"
#include "kernels/cuda/row.cuh"

namespace visionpulse::cuda {

namespace {

constexpr int kBins = 2048;
constexpr int kWarps = kSelectThreads / kThreadsPerWarp;
constexpr int kBinsPerThread = kBins / kSelectThreads;

struct Scratch {
  uint32_t bins[kBins];                                     // of this block; first the head masses
  uint32_t total[kBins];                                    // of the row
  uint32_t greater[kSelectCluster], equal[kSelectCluster];  // of each block of the row
  uint32_t warp_greater[kWarps], warp_equal[kWarps];
  uint32_t found_bin, found_before, found_count;
  float mass, mass_mean;
};

struct Pivot {
  uint32_t prefix;  // the leading bits of the K-th largest key
  int32_t shift;    // how many bits follow them
  uint32_t need;    // keys with this prefix to keep, the first in order
};

// One warp's candidates, in compact order: counted from the first visible one of the row.
struct Segment {
  int32_t first, begin, end;  // compact index of candidate 0, candidates [begin, end)
  int32_t slice;              // candidate at which the block's begin

  template <class Visit>
  __device__ __forceinline__ void each(const Spans& spans, Visit visit) const {
    SpanCursor<Order::kVisual> cursor{spans, 0, 0, 0};
    if (begin < end) cursor.seek(first + begin);
    VP_UNROLL_1 for (int32_t at = begin; at < end; at += kThreadsPerWarp) {
      const int32_t i = at + threadIdx.x % kThreadsPerWarp;
      if (i < end) cursor.advance(first + i);
      visit(i, i < end, first + i + cursor.held);
    }
  }
};

VP_DEVICE uint32_t key_at(const SelectArgs& args, int32_t b, int32_t position) {
  const float* at = args.scores + b * args.scores_row + position;
  float sum = 0.0f;
  for (int32_t part = 0; part < args.parts; ++part) sum += at[part * args.scores_part];
  return ordered_key(args.parts == 1 && args.weight == 1.0f ? at[0] : sum * args.weight);
}

// K of the row; every block computes it, the first writes the masses.
VP_DEVICE int32_t count_of(const SelectArgs& args, int32_t b, int32_t n_visual, bool first,
                           Scratch& scratch) {
  if (args.stats) {
    auto* masses = reinterpret_cast<float*>(scratch.bins);  // [H]
    const float* stats = args.stats + static_cast<int64_t>(b) * args.heads * kHeadStats;
    for (int32_t h = threadIdx.x; h < args.heads; h += blockDim.x) {
      masses[h] = stats[h * kHeadStats + 2];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const Masses of = masses_of_heads(masses, args.heads);
      scratch.mass = of.max;
      scratch.mass_mean = of.mean;
      if (first) {
        args.mass[b] = of.max;
        args.mass_mean[b] = of.mean;
      }
    }
  } else if (threadIdx.x == 0) {
    scratch.mass = args.mass[b];
    scratch.mass_mean = args.mass_mean[b];
  }
  __syncthreads();
  int32_t count;
  if (args.wanted) {
    count = count_of_wish(args.wanted[b], n_visual);
  } else {
    const float mass = args.mean_mass ? scratch.mass_mean : scratch.mass;
    const float ratio = clamped_ratio(args.ratio ? args.ratio[b] : mass, args.r_min, args.r_max);
    count = count_of_ratio(ratio, n_visual);
  }
  return count < args.k_max ? count : args.k_max;
}

// Adds the lanes that name one bin at once: scores crowd into few bins.
VP_DEVICE void count_bin(uint32_t* bins, bool active, uint32_t bin) {
  const uint32_t same = __match_any_sync(kWarp, active ? bin : 0xffffffffu);
  const int lane = threadIdx.x % kThreadsPerWarp;
  if (active && __ffs(same) - 1 == lane) {
    atomicAdd(bins + bin, static_cast<uint32_t>(__popc(same)));
  }
}

// The bins of all blocks of the row, added up.
template <bool kCluster>
VP_DEVICE const uint32_t* row_bins(Scratch& scratch) {
  if (!kCluster) {
    __syncthreads();
    return scratch.bins;
  }
  cluster_sync();
  constexpr int kOwn = kBins / kSelectCluster;
  const uint32_t rank = cluster_rank();
  for (int i = threadIdx.x; i < kOwn; i += blockDim.x) {
    const uint32_t bin = rank * kOwn + i;
    uint32_t sum = 0;
    VP_UNROLL for (uint32_t other = 0; other < kSelectCluster; ++other) {
      sum += remote_load(scratch.bins + bin, other);
    }
    VP_UNROLL for (uint32_t other = 0; other < kSelectCluster; ++other) {
      remote_store(scratch.total + bin, other, sum);
    }
  }
  cluster_sync();
  return scratch.total;
}

// Finds the bin, from the largest down, in which the `need`-th key lies.
VP_DEVICE void find_bin(const uint32_t* bins, uint32_t need, Scratch& scratch) {
  const int lane = threadIdx.x % kThreadsPerWarp, warp = threadIdx.x / kThreadsPerWarp;
  const int top = kBins - 1 - threadIdx.x * kBinsPerThread;
  uint32_t own = 0;
  VP_UNROLL for (int i = 0; i < kBinsPerThread; ++i) own += bins[top - i];
  uint32_t upto = own;
  VP_UNROLL for (int by = 1; by < kThreadsPerWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(kWarp, upto, by);
    if (lane >= by) upto += other;
  }
  if (lane == kThreadsPerWarp - 1) scratch.warp_greater[warp] = upto;
  __syncthreads();
  uint32_t before = upto - own;
  for (int w = 0; w < warp; ++w) before += scratch.warp_greater[w];
  if (before < need && need <= before + own) {
    VP_UNROLL for (int i = 0; i < kBinsPerThread; ++i) {
      const uint32_t count = bins[top - i];
      if (before < need && need <= before + count) {
        scratch.found_bin = top - i;
        scratch.found_before = before;
        scratch.found_count = count;
      }
      before += count;
    }
  }
  __syncthreads();
}

template <bool kCluster>
VP_DEVICE Pivot find_pivot(const SelectArgs& args, int32_t b, const Spans& spans,
                           const Segment& segment, bool cached, uint32_t count, Scratch& scratch,
                           uint32_t* keys) {
  Pivot pivot = {0, 32, count};
  VP_UNROLL_1 for (int pass = 0; pass < 3; ++pass) {
    const int32_t bits = pass == 2 ? 10 : 11, above = pivot.shift;
    pivot.shift -= bits;
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) scratch.bins[i] = 0;
    __syncthreads();
    segment.each(spans, [&](int32_t i, bool valid, int32_t position) {
      uint32_t key = 0;
      if (valid && cached && pass > 0) {
        key = keys[i - segment.slice];
      } else if (valid) {
        key = key_at(args, b, position);
        if (cached) keys[i - segment.slice] = key;
      }
      const bool inside = valid && (pass == 0 || key >> above == pivot.prefix);
      count_bin(scratch.bins, inside, key >> pivot.shift & ((1u << bits) - 1));
    });
    find_bin(row_bins<kCluster>(scratch), pivot.need, scratch);
    pivot.prefix = pivot.prefix << bits | scratch.found_bin;
    pivot.need -= scratch.found_before;
    const bool whole = pivot.need == scratch.found_count;
    __syncthreads();   // everybody has read what was found
    if (whole) break;  // all keys with this prefix are kept
  }
  return pivot;
}

// Where the warp's kept candidates go: how many greater and equal ones lie before it.
template <bool kCluster>
VP_DEVICE void count_before(uint32_t& greater, uint32_t& equal, Scratch& scratch) {
  const int lane = threadIdx.x % kThreadsPerWarp, warp = threadIdx.x / kThreadsPerWarp;
  if (lane == 0) {
    scratch.warp_greater[warp] = greater;
    scratch.warp_equal[warp] = equal;
  }
  __syncthreads();
  uint32_t rank = 0;
  if constexpr (kCluster) {
    rank = cluster_rank();
    if (threadIdx.x < kSelectCluster) {
      uint32_t all_greater = 0, all_equal = 0;
      for (int w = 0; w < kWarps; ++w) {
        all_greater += scratch.warp_greater[w];
        all_equal += scratch.warp_equal[w];
      }
      remote_store(scratch.greater + rank, threadIdx.x, all_greater);
      remote_store(scratch.equal + rank, threadIdx.x, all_equal);
    }
    cluster_sync();
  }
  greater = equal = 0;
  if constexpr (kCluster) {
    for (uint32_t other = 0; other < rank; ++other) {
      greater += scratch.greater[other];
      equal += scratch.equal[other];
    }
  }
  for (int w = 0; w < warp; ++w) {
    greater += scratch.warp_greater[w];
    equal += scratch.warp_equal[w];
  }
}

template <bool kCluster>
VP_DEVICE void select_row(const SelectArgs& args) {
  VP_SHARED(shared);
  wait_for_previous();
  auto& scratch = *reinterpret_cast<Scratch*>(shared);
  auto* keys = reinterpret_cast<uint32_t*>(shared + sizeof(Scratch));
  const int32_t blocks = kCluster ? kSelectCluster : 1;
  const int32_t b = blockIdx.x / blocks, rank = kCluster ? cluster_rank() : 0;
  const int lane = threadIdx.x % kThreadsPerWarp, warp = threadIdx.x / kThreadsPerWarp;

  const Spans spans = Spans::of(args.visual, b);
  const Range range = row_range(args.starts, args.lengths, args.capacity, args.window, b);
  const int32_t first = visual_before(spans, range.begin);
  const int32_t n_visual = visual_before(spans, range.end) - first;
  const int32_t count = count_of(args, b, n_visual, rank == 0, scratch);
  __syncthreads();
  if (rank == 0 && threadIdx.x == 0) args.counts[b] = count;
  int32_t* indices = args.indices + static_cast<int64_t>(b) * args.k_max;
  for (int32_t i = count + rank * blockDim.x + threadIdx.x; i < args.k_max;
       i += blocks * blockDim.x) {
    indices[i] = -1;
  }
  if (count == 0) return;

  const int32_t per_block = (n_visual + blocks - 1) / blocks;
  const int32_t slice = per_block * rank < n_visual ? per_block * rank : n_visual;
  const int32_t slice_end = n_visual - slice < per_block ? n_visual : slice + per_block;
  const int32_t per_warp =
      (per_block + kWarps * kThreadsPerWarp - 1) / (kWarps * kThreadsPerWarp) * kThreadsPerWarp;
  const int32_t begin = slice + per_warp * warp;
  const Segment segment = {first, begin < slice_end ? begin : slice_end,
                           slice_end - begin < per_warp ? slice_end : begin + per_warp, slice};
  const bool cached = per_block <= args.cached, all = count == n_visual;
  Pivot pivot = {0, 0, 0};
  if (!all) {
    pivot = find_pivot<kCluster>(args, b, spans, segment, cached, count, scratch, keys);
  } else if (kCluster) {
    cluster_sync();  // before its first barrier a block may not have its shared memory yet
  }

  const auto above_of = [&](int32_t i, bool valid, int32_t position) {
    if (!valid || all) return valid ? 1 : -1;
    const uint32_t key = cached ? keys[i - slice] : key_at(args, b, position);
    const uint32_t prefix = key >> pivot.shift;
    return prefix > pivot.prefix ? 1 : prefix == pivot.prefix ? 0 : -1;
  };
  uint32_t greater = 0, equal = 0;
  segment.each(spans, [&](int32_t i, bool valid, int32_t position) {
    const int above = above_of(i, valid, position);
    greater += __popc(__ballot_sync(kWarp, above > 0));
    equal += __popc(__ballot_sync(kWarp, above == 0));
  });
  count_before<kCluster>(greater, equal, scratch);
  const uint32_t lower = (1u << lane) - 1;
  segment.each(spans, [&](int32_t i, bool valid, int32_t position) {
    const int above = above_of(i, valid, position);
    const uint32_t more = __ballot_sync(kWarp, above > 0), same = __ballot_sync(kWarp, above == 0);
    const uint32_t ties = equal + __popc(same & lower);
    if (above > 0 || (above == 0 && ties < pivot.need)) {
      const uint32_t kept_ties = ties < pivot.need ? ties : pivot.need;
      indices[greater + __popc(more & lower) + kept_ties] = position;
    }
    greater += __popc(more);
    equal += __popc(same);
  });
  let_next_start();
}

}  // namespace

VP_KERNEL(kSelectThreads) vp_select_block(VP_ARGS(SelectArgs) args) { select_row<false>(args); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
VP_KERNEL(kSelectThreads) vp_select_cluster(VP_ARGS(SelectArgs) args) { select_row<true>(args); }
#else
// Never launched there: the plan asks for a cluster only where the chip has them.
VP_KERNEL(kSelectThreads) vp_select_cluster(VP_ARGS(SelectArgs)) {}
#endif

const void* select_kernel(bool cluster) {
  return cluster ? reinterpret_cast<const void*>(&vp_select_cluster)
                 : reinterpret_cast<const void*>(&vp_select_block);
}

int32_t select_fixed_bytes() { return sizeof(Scratch); }

}  // namespace visionpulse::cuda
