// SPDX-License-Identifier: Apache-2.0
// The one list of what is compiled: kind, head dim, head tile. An entry is a kernel of each stage
// that streams keys.
#pragma once

#include "kernels/cuda/args.h"

// X(kind, type, head dim, head tile): a head tile is the most query heads of one KV head that a
// block may hold, those of one query up to 32, and those of several queries of a row above. A team
// of warps shares the heads that the registers of one warp cannot hold, so a tile of 32 serves 5
// heads too where there is none of 8. For 8 bits beside float32 there is no other: it is right, and
// nobody's fast path.
#define VP_HALF_HEADS(X, dtype, type, d) X(dtype, type, d, 8) X(dtype, type, d, 32)
#define VP_FLOAT_HEADS(X, d) X(fp32, float, d, 4) X(fp32, float, d, 32)
#define VP_HEAD_DIM(X, d)             \
  VP_HALF_HEADS(X, bf16, BFloat16, d) \
  VP_HALF_HEADS(X, fp16, Float16, d)  \
  VP_FLOAT_HEADS(X, d)
#define VP_FLOAT8_HEADS(X, d)              \
  VP_HALF_HEADS(X, fp8, Float8Beside16, d) \
  X(fp8_fp32, Float8Beside32, d, 32)
// The head dims that D is padded to, ascending, each as M(X, head dim).
#define VP_HEAD_DIMS(M, X) M(X, 64) M(X, 80) M(X, 96) M(X, 128) M(X, 192) M(X, 256)
// Fewer for 8 bits: padding is computed with, but never read from memory.
#define VP_FLOAT8_HEAD_DIMS(M, X) M(X, 64) M(X, 128) M(X, 192) M(X, 256)
// Several queries of a row: fewer still.
#define VP_QUERY_HEAD_DIMS(M, X) M(X, 64) M(X, 128) M(X, 256)
#define VP_BF16_QUERIES(X, d) X(bf16, BFloat16, d, 64)
#define VP_FP16_QUERIES(X, d) X(fp16, Float16, d, 64)
#define VP_FP32_QUERIES(X) X(fp32, float, 128, 64) X(fp32, float, 256, 64)
#define VP_FP8_QUERIES(X, d) X(fp8, Float8Beside16, d, 64)
#define VP_FP8_ALL_QUERIES(X) \
  VP_QUERY_HEAD_DIMS(VP_FP8_QUERIES, X) X(fp8_fp32, Float8Beside32, 256, 64)
#ifndef VP_STREAM_KERNELS
#define VP_STREAM_KERNELS(X)              \
  VP_HEAD_DIMS(VP_HEAD_DIM, X)            \
  VP_FLOAT8_HEAD_DIMS(VP_FLOAT8_HEADS, X) \
  VP_QUERY_HEAD_DIMS(VP_BF16_QUERIES, X)  \
  VP_QUERY_HEAD_DIMS(VP_FP16_QUERIES, X)  \
  VP_FP32_QUERIES(X)                      \
  VP_FP8_ALL_QUERIES(X)
#endif
// Those that one object defines: all, or with VP_SPLIT those of a kind, so that no file compiles
// for long. attend.cu and score.cu have bfloat16 then, and attend_fp16.cu and so on the others.
#define VP_BF16_DIM(X, d) VP_HALF_HEADS(X, bf16, BFloat16, d)
#define VP_FP16_DIM(X, d) VP_HALF_HEADS(X, fp16, Float16, d)
#if !defined(VP_SPLIT)
#define VP_DEFINED(X) VP_STREAM_KERNELS(X)
#elif defined(VP_FP16)
#define VP_DEFINED(X) VP_HEAD_DIMS(VP_FP16_DIM, X) VP_QUERY_HEAD_DIMS(VP_FP16_QUERIES, X)
#elif defined(VP_FP32)
#define VP_DEFINED(X) VP_HEAD_DIMS(VP_FLOAT_HEADS, X) VP_FP32_QUERIES(X)
#elif defined(VP_FP8)
#define VP_DEFINED(X) VP_FLOAT8_HEAD_DIMS(VP_FLOAT8_HEADS, X) VP_FP8_ALL_QUERIES(X)
#else
#define VP_DEFINED(X) VP_HEAD_DIMS(VP_BF16_DIM, X) VP_QUERY_HEAD_DIMS(VP_BF16_QUERIES, X)
#endif
#if !defined(VP_FP16) && !defined(VP_FP32) && !defined(VP_FP8)
#define VP_LISTS_ALL  // the object that has the list of all kernels of its stage
#endif

namespace visionpulse::cuda {

constexpr Kind kKind_fp32 = Kind::kFloat32;
constexpr Kind kKind_bf16 = Kind::kBFloat16;
constexpr Kind kKind_fp16 = Kind::kFloat16;
constexpr Kind kKind_fp8 = Kind::kFloat8Beside16;
constexpr Kind kKind_fp8_fp32 = Kind::kFloat8Beside32;

}  // namespace visionpulse::cuda
