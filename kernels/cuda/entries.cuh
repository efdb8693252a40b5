// SPDX-License-Identifier: Apache-2.0
// The one list of what is compiled: dtype, head dim, row tile. A row here is a kernel of each
// stage.
#pragma once

#include "kernels/common/args.h"

// X(dtype, type, head dim, row tile): the query heads of one KV head that a block may hold. More
// than one warp's registers can hold are shared out over a team of warps, so 32 serves 5 of them
// too where there is no 8.
#define VP_HALF_ROWS(X, dtype, type, d) X(dtype, type, d, 8) X(dtype, type, d, 32)
#define VP_FLOAT_ROWS(X, d) X(fp32, float, d, 4) X(fp32, float, d, 32)
#define VP_HEAD_DIM(X, d)            \
  VP_HALF_ROWS(X, bf16, BFloat16, d) \
  VP_HALF_ROWS(X, fp16, Float16, d)  \
  VP_FLOAT_ROWS(X, d)
#ifndef VP_STREAM_KERNELS
#define VP_STREAM_KERNELS(X) \
  VP_HEAD_DIM(X, 64)         \
  VP_HEAD_DIM(X, 80)         \
  VP_HEAD_DIM(X, 96)         \
  VP_HEAD_DIM(X, 128)        \
  VP_HEAD_DIM(X, 192)        \
  VP_HEAD_DIM(X, 256)
#endif

namespace visionpulse::cuda {

constexpr DType kDType_fp32 = DType::kFloat32;
constexpr DType kDType_bf16 = DType::kBFloat16;
constexpr DType kDType_fp16 = DType::kFloat16;

}  // namespace visionpulse::cuda
