// SPDX-License-Identifier: Apache-2.0
// What a stream kernel is compiled for: the elements of q and the output, and those of K and V.
#pragma once

#include <type_traits>

#include "kernels/cuda/args.h"
#include "kernels/cuda/float8.cuh"

namespace visionpulse::cuda {

// K and V of 8 bits beside q of float32, or of bfloat16 or float16: StreamArgs::dtype says which.
struct Float8Beside32 {};
struct Float8Beside16 {};

// The bits of a bfloat16 or float16.
struct Half {
  uint16_t bits;
};

template <class T>
struct KindOf {
  using Query = T;
  using Cache = T;
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr bool kScaled = false;  // K and V have scales
};
template <>
struct KindOf<Float8Beside32> {
  using Query = float;
  using Cache = E4m3;
  static constexpr bool kTensorCores = false;
  static constexpr bool kScaled = true;
};
template <>
struct KindOf<Float8Beside16> {
  using Query = Half;
  using Cache = E4m3;
  static constexpr bool kTensorCores = true;
  static constexpr bool kScaled = true;
};

VP_DEVICE float load_half(const StreamArgs& args, Half x) {
  return args.dtype == DType::kBFloat16 ? Element<BFloat16>::load({x.bits})
                                        : Element<Float16>::load({x.bits});
}

// An element of the output.
template <class Query>
VP_DEVICE Query stored(const StreamArgs& args, float x) {
  if constexpr (std::is_same_v<Query, Half>) {
    return {args.dtype == DType::kBFloat16 ? Element<BFloat16>::store(x).bits
                                           : Element<Float16>::store(x).bits};
  } else {
    return Element<Query>::store(x);
  }
}

}  // namespace visionpulse::cuda
