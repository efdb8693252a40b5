// SPDX-License-Identifier: Apache-2.0
// Budget and exact top-K of a row: K from the mass, the K-th largest score by a radix select over
// ordered keys (11, 11 and 10 bits), then the kept positions in ascending order by counting. Ties
// go to the lowest position: what lies before a candidate is counted in index order, never raced
// for.
//
// All candidates are passed twice: for the histogram of the leading bits, then to list those in the
// bin of the K-th key and above, a few per cent. What follows looks at the lists alone.
//
// Several blocks serve a row. In a cluster they add up their histograms in distributed shared
// memory. Where the chip has no clusters, each leaves its keys and the histogram of their leading
// bits in global memory, and the one that comes last goes on alone: the wide read of the scores is
// shared out, and no block ever waits for another.
#include "kernels/common/budget.h"
#include "kernels/cuda/candidates.cuh"
#include "kernels/cuda/last.cuh"
#include "kernels/cuda/radix.cuh"

namespace visionpulse::cuda {

namespace {

constexpr int32_t kLeadingBits = 11;

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
    count = count_of_wanted(args.wanted[b], n_visual);
  } else {
    const float mass = args.mean_mass ? scratch.mass_mean : scratch.mass;
    const float ratio = clamped_ratio(args.ratio ? args.ratio[b] : mass, args.r_min, args.r_max);
    count = count_of_ratio(ratio, n_visual);
  }
  return count < args.k_max ? count : args.k_max;
}

// The candidates of one block: their keys, and of each warp the list of those that matter, which
// takes the place of its keys. Both lie in shared memory where there is room, else in global.
template <bool kCluster>
struct Row {
  const SelectArgs& args;
  SelectScratch& scratch;
  uint32_t* room;   // shared memory: args.cached keys, then as many positions
  int32_t b, rank;  // row, block of the row
  Spans spans;
  int32_t n;           // candidates of the row
  Candidates own;      // of this warp
  int32_t slice, end;  // candidates of this block
  int32_t listed;      // where this warp's list ends, as it begins where its candidates do
  bool fits;           // into shared memory

  __device__ __forceinline__ void take(int32_t slice_begin, int32_t slice_end) {
    slice = slice_begin, end = slice_end;
    fits = end - slice <= args.cached;
    constexpr int32_t kStep = kSelectWarps * kThreadsPerWarp;
    const int32_t per_warp = (end - slice + kStep - 1) / kStep * kThreadsPerWarp;
    const int32_t at = slice + per_warp * static_cast<int32_t>(threadIdx.x / kThreadsPerWarp);
    const int32_t begin = at < end ? at : end;
    own.take(spans, begin, end - begin < per_warp ? end : begin + per_warp);
  }

  // Places of a candidate's key, and of a position in a list. Never mixed into one pointer, of
  // which the compiler would not know the memory.
  __device__ __forceinline__ uint32_t* key_here(int32_t i) const { return room + (i - slice); }
  __device__ __forceinline__ uint32_t* key_there(int32_t i) const {
    return args.keys + b * args.keys_row + i;
  }
  __device__ __forceinline__ uint32_t* position_here(int32_t i) const {
    return room + args.cached + (i - slice);
  }
  __device__ __forceinline__ uint32_t* position_there(int32_t i) const {
    return args.positions + b * args.keys_row + i;
  }

  __device__ __forceinline__ void keep_key(bool here, int32_t i, uint32_t key) const {
    if (here) {
      *key_here(i) = key;
    } else {
      *key_there(i) = key;
    }
  }
  __device__ __forceinline__ uint32_t kept_key(bool here, int32_t i) const {
    return here ? *key_here(i) : load_fresh(key_there(i));
  }

  // Counts the leading bits of all keys, and keeps these: for whom they are handed to, or to list.
  __device__ __forceinline__ void fill_bins_of_scores(bool hand_over) {
    clear_bins(scratch);
    const bool here = fits && !hand_over;
    own.each([&](int32_t step, const int32_t (&position)[kAhead]) {
      uint32_t key[kAhead];
      own.read_scores(step, position, key);
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t i = step + u * kThreadsPerWarp;
        if (position[u] >= 0) keep_key(here, i, key[u]);
        count_bin(scratch, key[u] != kNoKey, key[u] >> (32 - kLeadingBits));
      }
    });
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
    take(0, n);
    return true;
  }

  // Lists the warp's keys in the pivot's bin and above, in order, in the place of the keys: no
  // entry lies behind the candidate it comes from.
  template <bool kFits>
  __device__ __forceinline__ void list(const Pivot& pivot, bool handed_over) {
    const bool here = kFits && (kCluster || !handed_over);
    const uint32_t lower = (1u << threadIdx.x % kThreadsPerWarp) - 1;
    listed = own.begin;
    own.each([&](int32_t step, const int32_t (&position)[kAhead]) {
      uint32_t key[kAhead];
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t i = step + u * kThreadsPerWarp;
        key[u] = position[u] < 0 ? kNoKey : kept_key(here, i);
      }
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const bool chosen = key[u] != kNoKey && key[u] >> pivot.shift >= pivot.prefix;
        const uint32_t among = __ballot_sync(kWarp, chosen);
        if (chosen) {
          const int32_t to = listed + __popc(among & lower);
          keep_key(kFits, to, key[u]);
          if (kFits) {
            *position_here(to) = position[u];
          } else {
            *position_there(to) = position[u];
          }
        }
        listed += __popc(among);
      }
    });
    __syncwarp();  // the other lanes read it
  }

  // Visits the warp's list in order: `visit(key, i)` by all lanes, with kNoKey past its end.
  template <bool kFits, class Visit>
  __device__ __forceinline__ void each_listed(Visit visit) const {
    VP_UNROLL_1 for (int32_t step = own.begin; step < listed; step += kThreadsPerWarp) {
      const int32_t i = step + threadIdx.x % kThreadsPerWarp;
      const uint32_t key = i >= listed ? kNoKey : kept_key(kFits, i);
      visit(key, i);
    }
  }

  // Counts the listed keys with the pivot's prefix by their next bits.
  template <bool kFits>
  __device__ __forceinline__ void fill_bins_of_list(const Pivot& pivot, int32_t bits) {
    clear_bins(scratch);
    const int32_t above = pivot.shift, shift = above - bits;
    each_listed<kFits>([&](uint32_t key, int32_t) {
      const bool inside = key != kNoKey && key >> above == pivot.prefix;
      count_bin(scratch, inside, key >> shift & ((1u << bits) - 1));
    });
    __syncthreads();
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
    own.each([&](int32_t step, const int32_t (&position)[kAhead]) {
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        if (position[u] >= 0) indices[step + u * kThreadsPerWarp] = position[u];
      }
    });
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
  template <bool kFits>
  __device__ __forceinline__ void write_kept(const Pivot& pivot) {
    int32_t* indices = args.indices + static_cast<int64_t>(b) * args.k_max;
    const auto is_above = [&](uint32_t key) {
      return key != kNoKey && key >> pivot.shift > pivot.prefix;
    };
    const auto is_equal = [&](uint32_t key) {
      return key != kNoKey && key >> pivot.shift == pivot.prefix;
    };
    uint32_t greater = 0, equal = 0;
    each_listed<kFits>([&](uint32_t key, int32_t) {
      greater += __popc(__ballot_sync(kWarp, is_above(key)));
      equal += __popc(__ballot_sync(kWarp, is_equal(key)));
    });
    count_before(greater, equal);
    const uint32_t lower = (1u << threadIdx.x % kThreadsPerWarp) - 1;
    each_listed<kFits>([&](uint32_t key, int32_t i) {
      const uint32_t more = __ballot_sync(kWarp, is_above(key));
      const uint32_t same = __ballot_sync(kWarp, is_equal(key));
      const uint32_t ties = equal + __popc(same & lower);
      if (is_above(key) || (is_equal(key) && ties < pivot.need)) {
        const uint32_t kept_ties = ties < pivot.need ? ties : pivot.need;
        indices[greater + __popc(more & lower) + kept_ties] =
            kFits ? *position_here(i) : load_fresh(position_there(i));
      }
      greater += __popc(more);
      equal += __popc(same);
    });
  }

  // What follows the leading bits, of which the pivot has those of the K-th key.
  template <bool kFits>
  __device__ __forceinline__ void choose(Pivot pivot, bool whole, bool handed_over) {
    list<kFits>(pivot, handed_over);
    VP_UNROLL_1 while (!whole && pivot.shift > 0) {
      const int32_t bits = pivot.shift < kLeadingBits ? pivot.shift : kLeadingBits;
      fill_bins_of_list<kFits>(pivot, bits);
      const uint32_t* bins = kCluster ? cluster_bins(scratch, rank) : scratch.bins;
      whole = narrow(pivot, bits, bins, scan_bins(bins, scratch), scratch);
    }
    write_kept<kFits>(pivot);
  }
};

template <bool kCluster>
VP_DEVICE void select_row(const SelectArgs& args) {
  VP_SHARED(shared);
  wait_for_previous();
  auto& scratch = *reinterpret_cast<SelectScratch*>(shared);
  auto* room = reinterpret_cast<uint32_t*>(shared + sizeof(SelectScratch));
  const int32_t blocks = args.blocks, b = blockIdx.x / blocks, rank = blockIdx.x % blocks;
  const bool shares = !kCluster && blocks > 1;  // the last block takes over

  const Spans spans = Spans::of(args.visual, b);
  const Range range = row_range(args.kv, args.window, b);
  const int32_t first = visual_before(spans, range.begin);
  const int32_t n = visual_before(spans, range.end) - first;
  const Candidates own = {args, args.scores + b * args.scores_row, b, first, 0, 0, {}};
  Row<kCluster> row = {args, scratch, room, b, rank, spans, n, own, 0, 0, 0, false};
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
  row.fill_bins_of_scores(shares);
  const uint32_t* bins = scratch.bins;
  if (kCluster) bins = cluster_bins(scratch, rank);
  if (shares) {
    if (!row.hand_over_bins()) return;
    bins = scratch.total;
  }
  const BinScan scan = scan_bins(bins, scratch);
  if (count < 0) count = count_of(args, b, scan.total, scratch);
  row.pad(count, shares ? 0 : rank, shares ? 1 : blocks);
  if (count == 0) return;
  Pivot pivot = {0, 32, static_cast<uint32_t>(count)};
  const bool whole = narrow(pivot, kLeadingBits, bins, scan, scratch);
  if (row.fits) {
    row.template choose<true>(pivot, whole, shares);
  } else {
    row.template choose<false>(pivot, whole, shares);
  }
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
