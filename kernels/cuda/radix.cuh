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
  uint32_t bins[kSelectBins];                             // of this block; first the head masses
  uint32_t total[kSelectBins];                            // of the row
  uint32_t greater[kSelectBlocks], equal[kSelectBlocks];  // of each block of a cluster
  uint32_t warp_greater[kSelectWarps], warp_equal[kSelectWarps];
  uint32_t found_bin, found_before, found_count, last;
  float mass, mass_mean;
};

struct Pivot {
  uint32_t prefix;  // the leading bits of the K-th largest key
  int32_t shift;    // how many bits follow them
  uint32_t need;    // keys with this prefix to keep, the first in order
};

// One thread's share of the bins, from the largest down.
struct BinScan {
  uint32_t before, own;  // keys in larger bins, keys in its own
  uint32_t total;        // in all bins
};

VP_DEVICE void clear_bins(SelectScratch& scratch) {
  for (int i = threadIdx.x; i < kSelectBins; i += blockDim.x) scratch.bins[i] = 0;
  __syncthreads();
}

// By one, which the hardware does at once for all lanes that name a bin: scores crowd into few.
VP_DEVICE void count_bin(SelectScratch& scratch, bool active, uint32_t bin) {
  if (active) atomicAdd(scratch.bins + bin, 1u);
}

// The bins of all blocks of a cluster, added up.
VP_DEVICE const uint32_t* cluster_bins(SelectScratch& scratch, uint32_t rank) {
  cluster_sync();
  constexpr int kOwn = kSelectBins / kSelectBlocks;
  for (int i = threadIdx.x; i < kOwn; i += blockDim.x) {
    const uint32_t bin = rank * kOwn + i;
    uint32_t sum = 0;
    VP_UNROLL for (uint32_t other = 0; other < kSelectBlocks; ++other) {
      sum += remote_load(scratch.bins + bin, other);
    }
    VP_UNROLL for (uint32_t other = 0; other < kSelectBlocks; ++other) {
      remote_store(scratch.total + bin, other, sum);
    }
  }
  cluster_sync();
  return scratch.total;
}

VP_DEVICE BinScan scan_bins(const uint32_t* bins, SelectScratch& scratch) {
  const int lane = threadIdx.x % kThreadsPerWarp, warp = threadIdx.x / kThreadsPerWarp;
  const int top = kSelectBins - 1 - threadIdx.x * kBinsPerThread;
  BinScan scan = {0, 0, 0};
  VP_UNROLL for (int i = 0; i < kBinsPerThread; ++i) scan.own += bins[top - i];
  uint32_t upto = scan.own;
  VP_UNROLL for (int by = 1; by < kThreadsPerWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(kWarp, upto, by);
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

// Finds the bin, from the largest down, in which the `need`-th key lies.
VP_DEVICE void find_bin(const uint32_t* bins, const BinScan& scan, uint32_t need,
                        SelectScratch& scratch) {
  const int top = kSelectBins - 1 - threadIdx.x * kBinsPerThread;
  uint32_t before = scan.before;
  if (before < need && need <= before + scan.own) {
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

// Takes the bin of the needed key into the prefix; true when all keys with this prefix are kept.
VP_DEVICE bool narrow(Pivot& pivot, int32_t bits, const uint32_t* bins, const BinScan& scan,
                      SelectScratch& scratch) {
  find_bin(bins, scan, pivot.need, scratch);
  pivot.shift -= bits;
  pivot.prefix = pivot.prefix << bits | scratch.found_bin;
  pivot.need -= scratch.found_before;
  const bool whole = pivot.need == scratch.found_count;
  __syncthreads();  // everybody has read what was found
  return whole;
}

}  // namespace visionpulse::cuda
