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
  uint32_t histogram[kSelectBins];                        // of this block; first the head masses
  uint32_t row_histogram[kSelectBins];                    // of all blocks of the row
  uint32_t greater[kSelectBlocks], equal[kSelectBlocks];  // of each block of a cluster
  uint32_t warp_greater[kSelectWarps], warp_equal[kSelectWarps];
  uint32_t pivot_bin, pivot_before, pivot_count;
  uint32_t last;
  float mass, mass_mean;
};

struct Pivot {
  uint32_t prefix;  // the leading bits of the K-th largest sort code
  int32_t shift;    // how many bits follow them
  uint32_t need;    // candidates with this prefix to keep, the first in order
};

// One thread's part of a histogram, from the largest bin down.
struct BinScan {
  uint32_t before, own;  // candidates in larger bins, candidates in its own
  uint32_t total;        // in all bins
};

VP_DEVICE void clear_histogram(SelectScratch& scratch) {
  for (int i = threadIdx.x; i < kSelectBins; i += blockDim.x) scratch.histogram[i] = 0;
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
  BinScan scan = {0, 0, 0};
  VP_UNROLL for (int i = 0; i < kBinsPerThread; ++i) scan.own += histogram[top - i];
  uint32_t upto = scan.own;
  VP_UNROLL for (int by = 1; by < kThreadsPerWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, upto, by);
    if (lane >= by) upto += other;
  }
  if (lane == kThreadsPerWarp - 1) scratch.warp_greater[warp] = upto;
  __syncthreads();
  scan.before = upto - scan.own;
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w < warp) scan.before += scratch.warp_greater[w];
    scan.total += scratch.warp_greater[w];
  }
  return scan;
}

// Finds the bin, from the largest down, that holds the `need`-th candidate.
VP_DEVICE void find_bin(const uint32_t* histogram, const BinScan& scan, uint32_t need,
                        SelectScratch& scratch) {
  const int top = kSelectBins - 1 - threadIdx.x * kBinsPerThread;
  uint32_t before = scan.before;
  if (before < need && need <= before + scan.own) {
    VP_UNROLL for (int i = 0; i < kBinsPerThread; ++i) {
      const uint32_t count = histogram[top - i];
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
VP_DEVICE bool narrow(Pivot& pivot, int32_t bits, const uint32_t* histogram, const BinScan& scan,
                      SelectScratch& scratch) {
  find_bin(histogram, scan, pivot.need, scratch);
  pivot.shift -= bits;
  pivot.prefix = pivot.prefix << bits | scratch.pivot_bin;
  pivot.need -= scratch.pivot_before;
  const bool whole = pivot.need == scratch.pivot_count;
  __syncthreads();  // all threads have read the pivot's bin
  return whole;
}

}  // namespace visionpulse::cuda
