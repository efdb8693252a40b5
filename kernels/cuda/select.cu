// SPDX-License-Identifier: Apache-2.0
// Budget and exact top-K of a row: K from the mass, the K-th largest score by a radix select over
// sort codes (11, 11 and 10 bits), then the kept positions in ascending order by counting. Ties go
// to the lowest position: what lies before a candidate is counted in index order, never raced for.
//
// All candidates are read twice: once for the histogram of the leading bits, once to list those in
// the bin of the K-th code and above, a few per cent. The later passes read only the lists.
//
// Several blocks serve a row, so that they share the wide read of the scores. In a cluster they add
// up their histograms in distributed shared memory. On a chip without clusters each block writes
// its sort codes and the histogram of their leading bits to global memory, and the block that
// arrives last goes on alone: no block ever waits for another.
#include "kernels/common/budget.h"
#include "kernels/cuda/arrival.cuh"
#include "kernels/cuda/candidates.cuh"
#include "kernels/cuda/masses.cuh"
#include "kernels/cuda/radix.cuh"

namespace visionpulse::cuda {

namespace {

constexpr int32_t kLeadingBits = 11;

// K of the row.
VP_DEVICE int32_t count_of(const SelectArgs& args, int32_t b, int32_t n_visual, float mass) {
  int32_t count;
  if (args.wanted) {
    count = count_of_wanted(args.wanted[b], n_visual);
  } else {
    const float ratio = clamped_ratio(args.ratio ? args.ratio[b] : mass, args.r_min, args.r_max);
    count = count_of_ratio(ratio, n_visual);
  }
  return count < args.k_max ? count : args.k_max;
}

// The candidates of one block: their sort codes, and of each warp the list of those that matter,
// which takes the place of its codes. Both lie in shared memory where they fit, else in global.
template <bool kCluster>
struct RowSelect {
  const SelectArgs& args;
  SelectScratch& scratch;
  uint32_t* cache;  // shared memory: args.cached sort codes, then as many positions
  int32_t b, rank;  // row, block of the row
  Spans spans;
  int32_t n;           // candidates of the row
  Candidates own;      // of this warp
  int32_t slice, end;  // candidates of this block
  int32_t listed;      // end of this warp's list, which begins where its candidates do
  bool fits;           // the slice, into shared memory

  __device__ __forceinline__ void take(int32_t slice_begin, int32_t slice_end) {
    slice = slice_begin, end = slice_end;
    fits = end - slice <= args.cached;
    constexpr int32_t kStep = kSelectWarps * kThreadsPerWarp;
    const int32_t per_warp = (end - slice + kStep - 1) / kStep * kThreadsPerWarp;
    const int32_t at = slice + per_warp * static_cast<int32_t>(threadIdx.x / kThreadsPerWarp);
    const int32_t begin = at < end ? at : end;
    own.take(spans, begin, end - begin < per_warp ? end : begin + per_warp);
  }

  // Where the sort code of a candidate lies, and a position of a list. Never mixed into one
  // pointer: the compiler would no longer know its memory.
  __device__ __forceinline__ uint32_t* shared_code(int32_t i) const { return cache + (i - slice); }
  __device__ __forceinline__ uint32_t* global_code(int32_t i) const {
    return args.sort_codes + b * args.codes_stride + i;
  }
  __device__ __forceinline__ uint32_t* shared_position(int32_t i) const {
    return cache + args.cached + (i - slice);
  }
  __device__ __forceinline__ uint32_t* global_position(int32_t i) const {
    return args.positions + b * args.codes_stride + i;
  }

  __device__ __forceinline__ void store_code(bool in_shared, int32_t i, uint32_t code) const {
    if (in_shared) {
      *shared_code(i) = code;
    } else {
      *global_code(i) = code;
    }
  }
  __device__ __forceinline__ uint32_t load_code(bool in_shared, int32_t i) const {
    return in_shared ? *shared_code(i) : load_fresh(global_code(i));
  }

  // Builds the histogram of the leading bits and stores the sort codes: in shared memory for
  // `list`, or in global memory for the last block.
  __device__ __forceinline__ void read_scores(bool hand_over) {
    const bool in_shared = fits && !hand_over;
    own.each([&](int32_t step, const int32_t (&position)[kAhead]) {
      uint32_t code[kAhead];
      own.read_codes(step, position, code);
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t i = step + u * kThreadsPerWarp;
        if (position[u] >= 0) store_code(in_shared, i, code[u]);
        count_code(scratch, code[u] != kNoCode, code[u] >> (32 - kLeadingBits));
      }
    });
    if (!kCluster) __syncthreads();  // the cluster meets next
  }

  // Hands the block's histogram to the one that arrives last; true there, with all added up.
  __device__ __forceinline__ bool hand_over_histogram() {
    uint32_t* all = args.histograms + static_cast<int64_t>(b) * args.blocks * kSelectBins;
    for (int i = threadIdx.x; i < kSelectBins; i += blockDim.x) {
      all[rank * kSelectBins + i] = scratch.histogram[i];
    }
    if (!arrived_last(args.counters + b, args.blocks, &scratch.last)) return false;
    for (int i = threadIdx.x; i < kSelectBins; i += blockDim.x) {
      uint32_t sum = 0;
      VP_UNROLL for (int32_t other = 0; other < kSelectBlocks; ++other) {
        sum += load_fresh(all + other * kSelectBins + i);
      }
      scratch.row_histogram[i] = sum;
    }
    __syncthreads();
    take(0, n);
    return true;
  }

  // Lists the warp's candidates in the pivot's bin and above, in order. The list overwrites the
  // sort codes, which is safe: no entry lies behind the candidate that it comes from.
  template <bool kFits>
  __device__ __forceinline__ void list(const Pivot& pivot, bool handed_over) {
    const bool in_shared = kFits && (kCluster || !handed_over);
    const uint32_t lower = (1u << lane_id()) - 1;
    listed = own.begin;
    own.each([&](int32_t step, const int32_t (&position)[kAhead]) {
      uint32_t code[kAhead];
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const int32_t i = step + u * kThreadsPerWarp;
        code[u] = position[u] < 0 ? kNoCode : load_code(in_shared, i);
      }
      VP_UNROLL for (int u = 0; u < kAhead; ++u) {
        const bool matters = code[u] != kNoCode && code[u] >> pivot.shift >= pivot.prefix;
        const uint32_t among = __ballot_sync(kAllLanes, matters);
        if (matters) {
          const int32_t to = listed + __popc(among & lower);
          store_code(kFits, to, code[u]);
          if (kFits) {
            *shared_position(to) = position[u];
          } else {
            *global_position(to) = position[u];
          }
        }
        listed += __popc(among);
      }
    });
    __syncwarp();  // the other lanes read it
  }

  // Visits the warp's list in order: `visit(code, i)` by all lanes, with kNoCode past its end.
  template <bool kFits, class Visit>
  __device__ __forceinline__ void each_listed(Visit visit) const {
    VP_UNROLL_1 for (int32_t step = own.begin; step < listed; step += kThreadsPerWarp) {
      const int32_t i = step + lane_id();
      const uint32_t code = i >= listed ? kNoCode : load_code(kFits, i);
      visit(code, i);
    }
  }

  // Builds the histogram of the bits behind the pivot's prefix, of the listed codes that have it.
  template <bool kFits>
  __device__ __forceinline__ void read_list(const Pivot& pivot, int32_t bits) {
    const int32_t above = pivot.shift, shift = above - bits;
    each_listed<kFits>([&](uint32_t code, int32_t) {
      const bool inside = code != kNoCode && code >> above == pivot.prefix;
      count_code(scratch, inside, code >> shift & ((1u << bits) - 1));
    });
    if (!kCluster) __syncthreads();  // the cluster meets next
  }

  // Writes the count, and -1 past it: all blocks together, or the last alone.
  __device__ __forceinline__ void pad(int32_t count, int32_t part, int32_t parts) const {
    int32_t* indices = args.indices + static_cast<int64_t>(b) * args.k_max;
    const int32_t threads = blockDim.x;
    // unrolled, the compiler would divide by the step first
    VP_UNROLL_1 for (int32_t i = count + part * threads + threadIdx.x; i < args.k_max;
                     i += parts * threads) {
      indices[i] = -1;
    }
    if (part == 0 && threadIdx.x == 0) args.counts[b] = count;
  }

  // Where all candidates are kept, or none, and each has a key: the i-th index is the i-th
  // candidate.
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

  // Adds up the candidates above and at the pivot that lie before this warp's.
  __device__ __forceinline__ void count_before(uint32_t& greater, uint32_t& equal) {
    const int lane = lane_id(), warp = threadIdx.x / kThreadsPerWarp;
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
      VP_UNROLL for (int32_t other = 0; other < kSelectBlocks; ++other) {
        greater += other < rank ? scratch.greater[other] : 0;
        equal += other < rank ? scratch.equal[other] : 0;
      }
    }
    for (int w = 0; w < warp; ++w) {
      greater += scratch.warp_greater[w];
      equal += scratch.warp_equal[w];
    }
  }

  // Writes the positions above the pivot, and the first of those at it, in order.
  template <bool kFits>
  __device__ __forceinline__ void write_kept(const Pivot& pivot) {
    int32_t* indices = args.indices + static_cast<int64_t>(b) * args.k_max;
    const auto is_above = [&](uint32_t code) {
      return code != kNoCode && code >> pivot.shift > pivot.prefix;
    };
    const auto is_equal = [&](uint32_t code) {
      return code != kNoCode && code >> pivot.shift == pivot.prefix;
    };
    uint32_t greater = 0, equal = 0;
    each_listed<kFits>([&](uint32_t code, int32_t) {
      greater += __popc(__ballot_sync(kAllLanes, is_above(code)));
      equal += __popc(__ballot_sync(kAllLanes, is_equal(code)));
    });
    count_before(greater, equal);
    const uint32_t lower = (1u << lane_id()) - 1;
    each_listed<kFits>([&](uint32_t code, int32_t i) {
      const uint32_t more = __ballot_sync(kAllLanes, is_above(code));
      const uint32_t same = __ballot_sync(kAllLanes, is_equal(code));
      const uint32_t ties = equal + __popc(same & lower);
      if (is_above(code) || (is_equal(code) && ties < pivot.need)) {
        const uint32_t kept_ties = ties < pivot.need ? ties : pivot.need;
        indices[greater + __popc(more & lower) + kept_ties] =
            kFits ? *shared_position(i) : load_fresh(global_position(i));
      }
      greater += __popc(more);
      equal += __popc(same);
    });
  }

  // The passes behind the leading bits; the pivot has those of the K-th code.
  template <bool kFits>
  __device__ __forceinline__ void refine(Pivot pivot, bool whole, bool handed_over) {
    list<kFits>(pivot, handed_over);
    VP_UNROLL_1 while (!whole && pivot.shift > 0) {
      const int32_t bits = pivot.shift < kLeadingBits ? pivot.shift : kLeadingBits;
      read_list<kFits>(pivot, bits);
      const uint32_t* histogram = kCluster ? cluster_histogram(scratch, rank) : scratch.histogram;
      whole = narrow(pivot, bits, scan_histogram(histogram, scratch), scratch);
    }
    write_kept<kFits>(pivot);
  }
};

template <bool kCluster>
VP_DEVICE void select_row(const SelectArgs& args) {
  VP_SHARED(shared);
  wait_for_previous();
  auto& scratch = *reinterpret_cast<SelectScratch*>(shared);
  auto* cache = reinterpret_cast<uint32_t*>(shared + sizeof(SelectScratch));
  const int32_t blocks = kCluster ? kSelectBlocks : args.blocks;
  const int32_t b = blockIdx.x / blocks, rank = blockIdx.x % blocks;
  const bool hands_over = !kCluster && blocks > 1;  // to the last block

  const Range range = row_range(args.kv, args.window, b);
  const Spans spans = Spans::of(args.visual, b);
  const HeadMasses masses(args.stats, b, args.heads);
  clear_histogram(scratch);  // while what describes the row is under way
  const int32_t first = visual_before(spans, range.begin);
  const int32_t n = visual_before(spans, range.end) - first;
  const Candidates own = {args, args.scores + b * args.scores_stride, b, first, 0, 0, {}};
  RowSelect<kCluster> row = {args, scratch, cache, b, rank, spans, n, own, 0, 0, 0, false};
  const int32_t per_block = (n + blocks - 1) / blocks;
  const int32_t slice = per_block * rank < n ? per_block * rank : n;
  row.take(slice, n - slice < per_block ? n : slice + per_block);
  const float* given = args.mean_mass ? args.mass_mean : args.mass;
  const float mass = !args.stats ? given[b] : args.mean_mass ? masses.mean() : masses.max();
  // by one warp of one block, and last: no other waits for it
  const auto write_masses = [&] {
    if (args.stats == nullptr || rank != 0 || threadIdx.x >= kThreadsPerWarp) return;
    const float mean = masses.mean(), max = masses.max();
    if (threadIdx.x == 0) args.mass[b] = max, args.mass_mean[b] = mean;
  };

  // Without pages no key can be missing, so K is known before any score is read.
  const bool pages = args.kv.table != nullptr;
  int32_t count = pages ? -1 : count_of(args, b, n, mass);
  if (count == 0 || count == n) {
    write_masses();
    return row.write_all(count);
  }
  row.read_scores(hands_over);
  const uint32_t* histogram = scratch.histogram;
  if (kCluster) histogram = cluster_histogram(scratch, rank);
  bool last = true;
  if (hands_over) {
    last = row.hand_over_histogram();
    histogram = scratch.row_histogram;
  }
  if (last) {
    const BinScan scan = scan_histogram(histogram, scratch);
    if (pages) count = count_of(args, b, scan.total, mass);
    if (count > 0) {
      Pivot pivot = {0, 32, static_cast<uint32_t>(count)};
      const bool whole = narrow(pivot, kLeadingBits, scan, scratch);
      if (row.fits) {
        row.template refine<true>(pivot, whole, hands_over);
      } else {
        row.template refine<false>(pivot, whole, hands_over);
      }
    }
    row.pad(count, hands_over ? 0 : rank, hands_over ? 1 : blocks);
  }
  write_masses();
  let_next_start();
}

}  // namespace

VP_KERNEL(kSelectThreads, 1) vp_select_global(VP_ARGS(SelectArgs) args) { select_row<false>(args); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
VP_KERNEL(kSelectThreads, 1) vp_select_cluster(VP_ARGS(SelectArgs) args) { select_row<true>(args); }
#else
// Never launched: the plan asks for clusters only where the loaded code has them.
VP_KERNEL(kSelectThreads, 1) vp_select_cluster(VP_ARGS(SelectArgs)) {}
#endif

const void* select_kernel(bool cluster) {
  return cluster ? reinterpret_cast<const void*>(&vp_select_cluster)
                 : reinterpret_cast<const void*>(&vp_select_global);
}

int32_t select_fixed_bytes() { return sizeof(SelectScratch); }

}  // namespace visionpulse::cuda
