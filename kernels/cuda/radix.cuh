// SPDX-License-Identifier: Apache-2.0
// The histograms of a radix select: filled by warps, added up over a cluster, searched from the
// top.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

constexpr int kSelectWarps = kSelectThreads / kThreadsPerWarp;
constexpr int kBinsPerThread = kSelectBins / kSelectThreads;

struct SelectScratch {
  alignas(16) uint32_t histogram[kSelectBins];            // of this block
  alignas(16) uint32_t row_histogram[kSelectBins];        // of all blocks of the row
  uint32_t greater[kSelectBlocks], equal[kSelectBlocks];  // of each block of a cluster
  uint32_t warp_greater[kSelectWarps], warp_equal[kSelectWarps];
  uint32_t pivot_bin, pivot_before, pivot_count;
  uint32_t last;
};

struct Pivot {
  uint32_t prefix;  // the leading bits of the K-th largest sort code
  int32_t shift;    // how many bits follow them
  uint32_t need;    // candidates with this prefix to keep, the first in order
};

// One thread's part of a histogram, from the largest bin down.
struct BinScan {
  uint32_t bins[kBinsPerThread];  // candidates in each
  uint32_t before, own;           // in larger bins, in its own together
  uint32_t total;                 // in all bins
};

VP_DEVICE void clear_histogram(SelectScratch& scratch) {
  static_assert(kBinsPerThread == 4, "one store of 16 bytes clears them");
  reinterpret_cast<uint4*>(scratch.histogram)[threadIdx.x] = uint4{0, 0, 0, 0};
  __syncthreads();
}

// Always by one, which the hardware does at once for all lanes that name a bin: scores crowd into
// few bins.
VP_DEVICE void count_code(SelectScratch& scratch, bool active, uint32_t bin) {
  if (active) atomicAdd(scratch.histogram + bin, 1u);
}

// The sum of the histograms of a cluster.
VP_DEVICE const uint32_t* cluster_histogram(SelectScratch& scratch, uint32_t rank) {
  cluster_sync();
  constexpr int kOwn = kSelectBins / kSelectBlocks;
  for (int i = threadIdx.x; i < kOwn; i += blockDim.x) {
    const uint32_t bin = rank * kOwn + i;
    uint32_t sum = 0;
    VP_UNROLL for (uint32_t other = 0; other < kSelectBlocks; ++other) {
      sum += remote_load(scratch.histogram + bin, other);
    }
    VP_UNROLL for (uint32_t other = 0; other < kSelectBlocks; ++other) {
      remote_store(scratch.row_histogram + bin, other, sum);
    }
  }
  cluster_sync();
  return scratch.row_histogram;
}

VP_DEVICE BinScan scan_histogram(const uint32_t* histogram, SelectScratch& scratch) {
  const int lane = lane_id(), warp = threadIdx.x / kThreadsPerWarp;
  const int top = kSelectBins - 1 - threadIdx.x * kBinsPerThread;
  BinScan scan = {};
  const int lowest = top - (kBinsPerThread - 1);
  const uint4 bins = *reinterpret_cast<const uint4*>(histogram + lowest);
  scan.bins[0] = bins.w, scan.bins[1] = bins.z, scan.bins[2] = bins.y, scan.bins[3] = bins.x;
  scan.own = bins.x + bins.y + bins.z + bins.w;
  // for the next pass: no other thread reads these bins any more
  *reinterpret_cast<uint4*>(scratch.histogram + lowest) = uint4{0, 0, 0, 0};
  uint32_t upto = scan.own;
  VP_UNROLL for (int by = 1; by < kThreadsPerWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, upto, by);
    if (lane >= by) upto += other;
  }
  if (lane == kThreadsPerWarp - 1) scratch.warp_greater[warp] = upto;
  __syncthreads();
  scan.before = upto - scan.own;
  VP_UNROLL for (int w = 0; w < kSelectWarps; ++w) {
    const uint32_t of_warp = scratch.warp_greater[w];
    scan.before += w < warp ? of_warp : 0;
    scan.total += of_warp;
  }
  return scan;
}

// Finds the bin, from the largest down, that holds the `need`-th candidate.
VP_DEVICE void find_bin(const BinScan& scan, uint32_t need, SelectScratch& scratch) {
  const int top = kSelectBins - 1 - threadIdx.x * kBinsPerThread;
  uint32_t before = scan.before;
  if (before < need && need <= before + scan.own) {
    VP_UNROLL for (int i = 0; i < kBinsPerThread; ++i) {
      const uint32_t count = scan.bins[i];
      if (before < need && need <= before + count) {
        scratch.pivot_bin = top - i;
        scratch.pivot_before = before;
        scratch.pivot_count = count;
      }
      before += count;
    }
  }
  __syncthreads();
}

// Appends the bin of the needed candidate to the prefix. True when every candidate with the new
// prefix is kept.
VP_DEVICE bool narrow(Pivot& pivot, int32_t bits, const BinScan& scan, SelectScratch& scratch) {
  find_bin(scan, pivot.need, scratch);
  pivot.shift -= bits;
  pivot.prefix = pivot.prefix << bits | scratch.pivot_bin;
  pivot.need -= scratch.pivot_before;
  // The block meets again, behind the next histogram, before the bin changes.
  return pivot.need == scratch.pivot_count;
}

}  // namespace visionpulse::cuda
