// SPDX-License-Identifier: Apache-2.0
// Prints what the engine hands to each kernel of a decode step: the engine's own sources, on a chip
// that is described in words, with a launch that takes notes. No kernel runs, no memory is touched,
// so the addresses are made up: array n lies at n << 36.
//
// launches STEP CAPABILITY MULTIPROCESSORS SHARED ROWS HEADS KV_HEADS TEXT VISUAL KEPT SPANS FLOAT8
//          QUERIES
//
// A line a launch: kernel, grid, threads, shared bytes, cluster, splits of the row, arguments in
// hex.
#define VP_STREAM_KERNELS(X) \
  X(bf16, BFloat16, 128, 8)  \
  X(bf16, BFloat16, 128, 32) X(bf16, BFloat16, 128, 64) X(fp8, Float8Beside16, 128, 8)
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "csrc/cuda/engine.cpp"
#include "csrc/cuda/plan.cpp"
#include "kernels/cuda/attend.cu"
#include "kernels/cuda/score.cu"
#include "kernels/cuda/score_finish.cu"
#include "kernels/cuda/select.cu"

namespace visionpulse::cuda {

Chip chip;
int32_t all_keys, listed_keys;  // of the row, and of text and list

const Chip& chip_of(int32_t) { return chip; }
void load(const char*, const void*, int32_t) {}
OnDevice::OnDevice(int32_t) {}
OnDevice::~OnDevice() {}

void launch(const Launch& what, const void* args, int32_t, cudaStream_t) {
  const std::string name = what.name;
  const size_t size = name.find("finish") != std::string::npos   ? sizeof(ScoreFinishArgs)
                      : name.find("select") != std::string::npos ? sizeof(SelectArgs)
                                                                 : sizeof(StreamArgs);
  int32_t splits = 1;
  if (size == sizeof(StreamArgs)) {
    const auto& of = *static_cast<const StreamArgs*>(args);
    const int32_t keys = of.selection.indices ? listed_keys : all_keys;
    splits = split_count(keys, split_length(of.rule, keys, of.kv_heads));
  }
  std::printf("%s %u %u %u %d %d %d %d ", what.name, what.grid.x, what.grid.y, what.grid.z,
              what.threads, what.shared_bytes, what.cluster, splits);
  const auto* bytes = static_cast<const unsigned char*>(args);
  for (size_t i = 0; i < size; ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
}

}  // namespace visionpulse::cuda

namespace {

template <class T = void>
T* array(uintptr_t n) {
  return reinterpret_cast<T*>(n << 36);
}

}  // namespace

int main(int, char** words) {
  using namespace visionpulse;
  const std::string step = words[1];
  int of[12];
  for (int i = 0; i < 12; ++i) of[i] = std::atoi(words[i + 2]);
  const auto [capability, multiprocessors, shared, rows, heads, kv_heads, text, visual, kept, spans,
              float8, queries] = of;
  constexpr int kDim = 128;
  cuda::chip = {capability, capability, multiprocessors, shared};
  cuda::all_keys = text + visual, cuda::listed_keys = text + kept;
  cuda::Call call = {};
  const int64_t capacity = text + visual;
  const Strides side = {kv_heads * capacity * kDim, capacity * kDim, kDim};
  call.cache.k = array(1), call.cache.v = array(2);
  call.cache.starts = array<int32_t>(3), call.cache.lengths = array<int32_t>(4);
  call.cache.k_stride = call.cache.v_stride = side;
  call.cache.capacity = text + visual;
  call.cache.dtype = float8 ? DType::kFloat8 : DType::kBFloat16;
  if (float8) {
    call.cache.k_scale = {array<float>(15), 1};
    call.cache.v_scale = {array<float>(16), 1};
  }
  if (step != "dense") {
    call.visual = {array<int32_t>(5), array<int32_t>(6), spans};
    call.candidates = visual;
  }
  if (step == "follower") call.selection = {array<int32_t>(7), array<int32_t>(8), kept};
  const float ratio = static_cast<float>(kept) / visual;
  call.score = {1.0f / std::sqrt(1.0f * kDim),
                0.0f,
                0.4f,
                ratio,
                ratio,
                0,
                kept,
                ScoreKind::kProb,
                MassOf::kMax,
                nullptr,
                nullptr};
  call.q = array(9), call.out = array(10);
  call.q_stride = call.out_stride = {queries * heads * kDim, kDim};
  call.queries = {queries, heads * kDim, heads * kDim, nullptr};
  call.dtype = DType::kBFloat16;
  call.B = rows, call.H = heads, call.G = kv_heads, call.D = kDim;
  call.indices = array<int32_t>(7), call.counts = array<int32_t>(8);
  call.mass = array<float>(11), call.mass_mean = array<float>(12);
  const cuda::Scratch scratch = {array(13), int64_t{1} << 36, array<uint32_t>(14)};
  if (step == "dense" || step == "follower") return static_cast<int>(cuda::attend(call, scratch));
  return static_cast<int>(cuda::decode(call, step == "anchor-dense", nullptr, scratch));
}
