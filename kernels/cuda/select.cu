// SPDX-License-Identifier: Apache-2.0
// Budget and exact top-K of a row: K from the mass, the K-th largest score by a radix select over
// ordered keys (11, 11 and 10 bits), then the kept positions in ascending order by counting. Ties
// go to the lowest position: what lies before a candidate is counted in index order, never raced
// for.
//
// Several blocks serve a row. In a cluster they add up their histograms in distributed shared
// memory. Where the chip has no clusters, each leaves its keys and the histogram of their leading
// bits in global memory, and the one that comes last goes on alone: the wide read of the scores is
// shared out, and no block ever waits for another.
#include "kernels/common/budget.h"
#include "kernels/common/keys.h"
#include "kernels/cuda/last.cuh"
#include "kernels/cuda/radix.cuh"
#include "kernels/cuda/row.cuh"

namespace visionpulse::cuda {

namespace {

constexpr int kAhead = 4;  // candidates of a lane that are on their way from memory at once

// What stands for a visual position without a key; no score has it, NaN has 0 and -inf 0x7fffff.
constexpr uint32_t kNoKey = 1;

VP_DEVICE void read_scores(const SelectArgs& args, int32_t b, const int32_t (&place)[kAhead],
                           float (&score)[kAhead]) {
  const float* row = args.scores + b * args.scores_row;
  VP_UNROLL for (int u = 0; u < kAhead; ++u) score[u] = row[place[u]];
  if (args.parts == 1 && args.weight == 1.0f) return;
#pragma unroll 2
  for (int32_t part = 1; part < args.parts; ++part) {
    row += args.scores_part;
    VP_UNROLL for (int u = 0; u < kAhead; ++u) score[u] += row[place[u]];
  }
  VP_UNROLL for (int u = 0; u < kAhead; ++u) score[u] *= args.weight;
}

VP_DEVICE void read_masses(const SelectArgs& args, int32_t b, bool write, SelectScratch& scratch) {
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
      if (write) {
        args.mass[b] = of.max;
        args.mass_mean[b] = of.mean;
      }
    }
  } else if (threadIdx.x == 0) {
    scratch.mass = args.mass[b];
    scratch.mass_mean = args.mass_mean[b];
  }
  __syncthreads();
}

// K of the row, from its candidates and its mass.
VP_DEVICE int32_t count_of(const SelectArgs& args, int32_t b, int32_t n_visual,
                           const SelectScratch& scratch) {
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

// The candidates of one block, and where it finds their keys: in the scores, then in what it or the
// blocks before it kept of them. Candidates are counted from the first visible one of the row.
template <bool kCluster>
struct Row {
  enum class From { kScores, kGlobal, kShared };

  const SelectArgs& args;
  SelectScratch& scratch;
  uint32_t* cache;  // shared memory for args.cached keys
  int32_t b, rank;  // row, block of the row
  Spans spans;
  int32_t first, n;      // visual index of candidate 0, candidates
  int32_t slice, end;    // candidates of this block
  int32_t begin, limit;  // candidates of this warp
  From from;

  __device__ __forceinline__ void take(int32_t slice_begin, int32_t slice_end) {
    slice = slice_begin, end = slice_end;
    constexpr int32_t kStep = kSelectWarps * kThreadsPerWarp;
    const int32_t per_warp = (end - slice + kStep - 1) / kStep * kThreadsPerWarp;
    const int32_t at = slice + per_warp * static_cast<int32_t>(threadIdx.x / kThreadsPerWarp);
    begin = at < end ? at : end;
    limit = end - begin < per_warp ? end : begin + per_warp;
  }

  // The keys of a lane's candidates i, i + 32 and so on; kNoKey where the position is -1.
  __device__ __forceinline__ void read_keys(int32_t i, const int32_t (&position)[kAhead],
                                            uint32_t (&key)[kAhead]) const {
    if (from == From::kScores) {
      int32_t place[kAhead];
      float score[kAhead];
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t index = first + i + u * kThreadsPerWarp;
        place[u] = position[u] < 0 ? 0 : args.by_position ? position[u] : index;
      }
      read_scores(args, b, place, score);
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const bool there = position[u] >= 0 && has_key(args.kv, b, position[u]);
        key[u] = there ? ordered_key(score[u]) : kNoKey;
      }
      return;
    }
    const uint32_t* global = args.keys + b * args.keys_row + i;
    VP_UNROLL for (int u = 0; u < kAhead; ++u) {
      const int32_t at = u * kThreadsPerWarp;
      key[u] = position[u] < 0         ? kNoKey
               : from == From::kShared ? cache[i - slice + at]
                                       : load_fresh(global + at);
    }
  }

  // Visits the warp's candidates in order: `visit(candidate, key, position)` by all lanes, with
  // kNoKey where there is none, and position -1 past the end.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    SpanCursor<Order::kVisual> cursor{spans, 0, 0, 0};
    if (begin < limit) cursor.seek(first + begin);
    VP_UNROLL_1 for (int32_t at = begin; at < limit; at += kAhead * kThreadsPerWarp) {
      const int32_t i = at + threadIdx.x % kThreadsPerWarp;
      int32_t position[kAhead];
      uint32_t key[kAhead];
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t index = first + i + u * kThreadsPerWarp;
        position[u] = -1;
        if (index < first + limit) {
          cursor.advance(index);
          position[u] = index + cursor.held;
        }
      }
      read_keys(i, position, key);
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        visit(i + u * kThreadsPerWarp, key[u], position[u]);
      }
    }
  }

  // Counts the keys with the pivot's prefix by their next bits, and keeps them for the next pass.
  __device__ __forceinline__ void fill_bins(const Pivot& pivot, int32_t bits, bool hand_over) {
    for (int i = threadIdx.x; i < kSelectBins; i += blockDim.x) scratch.bins[i] = 0;
    __syncthreads();
    const bool caching = from != From::kShared && !hand_over && end - slice <= args.cached;
    const int32_t above = pivot.shift, shift = above - bits;
    each([&](int32_t i, uint32_t key, int32_t position) {
      if (position >= 0) {
        if (caching) cache[i - slice] = key;
        if (hand_over) args.keys[b * args.keys_row + i] = key;
      }
      const bool inside = key != kNoKey && (above == 32 || key >> above == pivot.prefix);
      count_bin(scratch.bins, inside, key >> shift & ((1u << bits) - 1));
    });
    if (caching) from = From::kShared;
    __syncthreads();
  }

  // Leaves the block's bins to the one that comes last; true in that one, with all bins added up.
  __device__ __forceinline__ bool hand_over_bins() {
    uint32_t* all = args.bins + static_cast<int64_t>(b) * args.blocks * kSelectBins;
    for (int i = threadIdx.x; i < kSelectBins; i += blockDim.x) {
      all[rank * kSelectBins + i] = scratch.bins[i];
    }
    if (!came_last(args.counters + b, args.blocks, &scratch.last)) return false;
    for (int i = threadIdx.x; i < kSelectBins; i += blockDim.x) {
      uint32_t sum = 0;
      VP_UNROLL for (int32_t other = 0; other < kSelectBlocks; ++other) {
        sum += load_fresh(all + other * kSelectBins + i);
      }
      scratch.total[i] = sum;
    }
    __syncthreads();
    from = From::kGlobal;
    take(0, n);
    return true;
  }

  // -1 past the count, by all blocks or by the last.
  __device__ __forceinline__ void pad(int32_t count, int32_t part, int32_t parts) const {
    int32_t* indices = args.indices + static_cast<int64_t>(b) * args.k_max;
    const int32_t threads = blockDim.x;
    for (int32_t i = count + part * threads + threadIdx.x; i < args.k_max; i += parts * threads) {
      indices[i] = -1;
    }
    if (part == 0 && threadIdx.x == 0) args.counts[b] = count;
  }

  // With all or no candidates kept and none without a key, the i-th index is the i-th candidate.
  __device__ __forceinline__ void write_all(int32_t count) const {
    pad(count, rank, args.blocks);
    if (count == 0) return;
    int32_t* indices = args.indices + static_cast<int64_t>(b) * args.k_max;
    SpanCursor<Order::kVisual> cursor{spans, 0, 0, 0};
    if (begin < limit) cursor.seek(first + begin);
    VP_UNROLL_1 for (int32_t i = begin + threadIdx.x % kThreadsPerWarp; i < limit;
                     i += kThreadsPerWarp) {
      cursor.advance(first + i);
      indices[i] = first + i + cursor.held;
    }
  }

  // Where the warp's kept candidates go: how many greater and equal ones lie before it.
  __device__ __forceinline__ void count_before(uint32_t& greater, uint32_t& equal) {
    const int lane = threadIdx.x % kThreadsPerWarp, warp = threadIdx.x / kThreadsPerWarp;
    if (lane == 0) {
      scratch.warp_greater[warp] = greater;
      scratch.warp_equal[warp] = equal;
    }
    __syncthreads();
    if constexpr (kCluster) {
      if (threadIdx.x < kSelectBlocks) {
        uint32_t all_greater = 0, all_equal = 0;
        for (int w = 0; w < kSelectWarps; ++w) {
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
      for (int32_t other = 0; other < rank; ++other) {
        greater += scratch.greater[other];
        equal += scratch.equal[other];
      }
    }
    for (int w = 0; w < warp; ++w) {
      greater += scratch.warp_greater[w];
      equal += scratch.warp_equal[w];
    }
  }

  // The positions whose keys are above the pivot, and the first of those at it, in order.
  __device__ __forceinline__ void write_kept(const Pivot& pivot) {
    int32_t* indices = args.indices + static_cast<int64_t>(b) * args.k_max;
    const auto is_above = [&](uint32_t key) {
      return key != kNoKey && key >> pivot.shift > pivot.prefix;
    };
    const auto is_equal = [&](uint32_t key) {
      return key != kNoKey && key >> pivot.shift == pivot.prefix;
    };
    uint32_t greater = 0, equal = 0;
    each([&](int32_t, uint32_t key, int32_t) {
      greater += __popc(__ballot_sync(kWarp, is_above(key)));
      equal += __popc(__ballot_sync(kWarp, is_equal(key)));
    });
    count_before(greater, equal);
    const uint32_t lower = (1u << threadIdx.x % kThreadsPerWarp) - 1;
    each([&](int32_t, uint32_t key, int32_t position) {
      const uint32_t more = __ballot_sync(kWarp, is_above(key));
      const uint32_t same = __ballot_sync(kWarp, is_equal(key));
      const uint32_t ties = equal + __popc(same & lower);
      if (is_above(key) || (is_equal(key) && ties < pivot.need)) {
        const uint32_t kept_ties = ties < pivot.need ? ties : pivot.need;
        indices[greater + __popc(more & lower) + kept_ties] = position;
      }
      greater += __popc(more);
      equal += __popc(same);
    });
  }
};

template <bool kCluster>
VP_DEVICE void select_row(const SelectArgs& args) {
  VP_SHARED(shared);
  wait_for_previous();
  auto& scratch = *reinterpret_cast<SelectScratch*>(shared);
  auto* cache = reinterpret_cast<uint32_t*>(shared + sizeof(SelectScratch));
  const int32_t blocks = args.blocks, b = blockIdx.x / blocks, rank = blockIdx.x % blocks;
  const bool shares = !kCluster && blocks > 1;  // the last block takes over

  const Spans spans = Spans::of(args.visual, b);
  const Range range = row_range(args.kv, args.window, b);
  const int32_t first = visual_before(spans, range.begin);
  const int32_t n = visual_before(spans, range.end) - first;
  Row<kCluster> row = {
      args, scratch, cache, b, rank, spans, first, n, 0, 0, 0, 0, Row<kCluster>::From::kScores};
  const int32_t per_block = (n + blocks - 1) / blocks;
  const int32_t slice = per_block * rank < n ? per_block * rank : n;
  row.take(slice, n - slice < per_block ? n : slice + per_block);
  read_masses(args, b, rank == 0, scratch);

  // Where no page can be missing, K is known before any score is read.
  int32_t count = -1;
  if (args.kv.table == nullptr) {
    count = count_of(args, b, n, scratch);
    if (count == 0 || count == n) return row.write_all(count);
  }
  Pivot pivot = {0, 32, 0};
  row.fill_bins(pivot, 11, shares);
  const uint32_t* bins = scratch.bins;
  if (kCluster) bins = cluster_bins(scratch, rank);
  if (shares) {
    if (!row.hand_over_bins()) return;
    bins = scratch.total;
  }
  BinScan scan = scan_bins(bins, scratch);
  if (count < 0) count = count_of(args, b, scan.total, scratch);
  row.pad(count, shares ? 0 : rank, shares ? 1 : blocks);
  if (count == 0) return;
  pivot.need = count;
  VP_UNROLL_1 for (int pass = 0; pass < 3; ++pass) {
    const int32_t bits = pass == 2 ? 10 : 11;
    if (pass > 0) {
      row.fill_bins(pivot, bits, false);
      bins = kCluster ? cluster_bins(scratch, rank) : scratch.bins;
      scan = scan_bins(bins, scratch);
    }
    find_bin(bins, scan, pivot.need, scratch);
    pivot.shift -= bits;
    pivot.prefix = pivot.prefix << bits | scratch.found_bin;
    pivot.need -= scratch.found_before;
    const bool whole = pivot.need == scratch.found_count;
    __syncthreads();   // everybody has read what was found
    if (whole) break;  // all keys with this prefix are kept
  }
  row.write_kept(pivot);
  let_next_start();
}

}  // namespace

VP_KERNEL(kSelectThreads, 1) vp_select_global(VP_ARGS(SelectArgs) args) { select_row<false>(args); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
VP_KERNEL(kSelectThreads, 1) vp_select_cluster(VP_ARGS(SelectArgs) args) { select_row<true>(args); }
#else
// Never launched there: the plan asks for a cluster only where the chip has them.
VP_KERNEL(kSelectThreads, 1) vp_select_cluster(VP_ARGS(SelectArgs)) {}
#endif

const void* select_kernel(bool cluster) {
  return cluster ? reinterpret_cast<const void*>(&vp_select_cluster)
                 : reinterpret_cast<const void*>(&vp_select_global);
}

int32_t select_fixed_bytes() { return sizeof(SelectScratch); }

}  // namespace visionpulse::cuda
