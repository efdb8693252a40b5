// SPDX-License-Identifier: Apache-2.0
// What a stream kernel is made of, by its kind, head dim and head tile: the tile of a warp and the
// query heads in it, and the blocks that a multiprocessor has registers for.
#pragma once

#include <type_traits>

#include "kernels/cuda/dot_tile.cuh"
#include "kernels/cuda/float8_tile.cuh"
#include "kernels/cuda/half_queries.cuh"
#include "kernels/cuda/mma_tile.cuh"
#include "kernels/cuda/queries.cuh"

namespace visionpulse::cuda {

// Query heads that one warp holds, out of the head tile of its block. Of the longest keys and
// several queries registers hold eight.
template <class T, int D, int kHeadTile>
constexpr int kWarpHeads = kHeadTile <= 8                             ? kHeadTile
                           : !KindOf<T>::kTensorCores                 ? 8
                           : of_several_queries(kHeadTile) && D > 128 ? 8
                                                                      : 16;

// 16-bit types use the tensor cores even where a tile of eight heads is half empty: the products
// cost nothing there, while on the CUDA cores a tile would take every issue slot that memory
// leaves.
template <class T, int D, int kHeads, bool kSeveral = false>
struct TileFor {
  using Tile = std::conditional_t<KindOf<T>::kTensorCores, MmaTile<T, D, kHeads>,
                                  DotTile<typename KindOf<T>::Cache, D, kHeads>>;
  using Query = Queries<typename KindOf<T>::Query, Tile, kHeads, kSeveral>;
};
template <int D, int kHeads, bool kSeveral>
struct TileFor<Float8Beside16, D, kHeads, kSeveral> {
  using Tile = Float8Tile<D, kHeads>;
  using Query = HalfQueries<Tile, D, kHeads, kSeveral>;
};
template <class T, int D, int kHeads>
using TileOf = typename TileFor<T, D, kHeads>::Tile;

// Blocks of a multiprocessor for which registers are kept free. Where warps share a tile fewer
// tiles are under way: of several queries, which share most, a third block makes up for that.
template <class T, int D, int kHeadTile>
constexpr int kResidentFor =
    of_several_queries(kHeadTile) && sizeof(typename KindOf<T>::Cache) == 2 && D <= 128
        ? 3
        : kResidentBlocks;

template <class Tile, int kHeads>
VP_HD constexpr WarpTile warp_tile() {
  return {kHeads,         Tile::kKeys, Tile::kQueryBytes, Tile::kScaleBytes, Tile::kWeightBytes,
          Tile::kSumBytes};
}

}  // namespace visionpulse::cuda
