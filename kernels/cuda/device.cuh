// SPDX-License-Identifier: Apache-2.0
// The device layer: every instruction that plain CUDA C++ cannot say, once, and beside it what the
// host simulation of tests/cusim does in its place. Kernels above this file hold no PTX.
#pragma once

#include "kernels/common/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define VP_DEVICE static __device__ __forceinline__
#define VP_UNROLL _Pragma("unroll")
#define VP_UNROLL_1 _Pragma("unroll 1")
// `resident`: blocks for which a multiprocessor must have enough registers.
#define VP_KERNEL(threads, resident) extern "C" __global__ void __launch_bounds__(threads, resident)
#define VP_GLOBAL __global__
#define VP_ARGS(type) const __grid_constant__ type
#define VP_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "builtins.h"
#include "warp_matrix.h"

#define VP_DEVICE static inline
#define VP_UNROLL
#define VP_UNROLL_1
#define VP_KERNEL(threads, resident) extern "C" void
#define VP_GLOBAL
// by reference, so that one pointer calls every kernel
#define VP_ARGS(type) const type&
#define VP_SHARED(name) \
  auto* name = reinterpret_cast<unsigned char*>(cusim::machine.current->block->shared)
#endif

namespace visionpulse::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

VP_DEVICE int lane_id() { return threadIdx.x % 32; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if defined(__CUDACC__)

VP_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
VP_DEVICE uint32_t float_word(float x) { return __float_as_uint(x); }
VP_DEVICE uint64_t high_product(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
// Results below 2^-126 become 0: such a weight of a softmax is below its rounding.
VP_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Of a number between 2^-126 and 2^126, but for its last bit.
VP_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VP_DEVICE float precise_exp2(float x) { return exp2f(x); }
VP_DEVICE float precise_log2(float x) { return log2f(x); }

#else

VP_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
VP_DEVICE uint32_t float_word(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
VP_DEVICE uint64_t high_product(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
}
VP_DEVICE float fast_exp2(float x) { return exp2f(x); }
VP_DEVICE float reciprocal(float x) { return 1.0f / x; }
VP_DEVICE float precise_exp2(float x) { return exp2f(x); }
VP_DEVICE float precise_log2(float x) { return log2f(x); }

#endif

// One element to float32 and back; two in a word, the lower half first.
template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr int kChunk = 4;  // elements in 16 bytes
  static constexpr bool kTensorCores = false;
  VP_HD float load(float x) { return x; }
  VP_HD float store(float x) { return x; }
};

template <>
struct Element<BFloat16> {
  static constexpr int kChunk = 8;
  static constexpr bool kTensorCores = true;
#if defined(__CUDACC__)
  VP_DEVICE float load(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
  VP_DEVICE BFloat16 store(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
  VP_DEVICE uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
#else
  static float load(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
  static BFloat16 store(float x) {
    const uint32_t u = float_word(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
  }
  static uint32_t pack(float low, float high) {
    return store(low).bits | static_cast<uint32_t>(store(high).bits) << 16;
  }
#endif
};

template <>
struct Element<Float16> {
  static constexpr int kChunk = 8;
  static constexpr bool kTensorCores = true;
#if defined(__CUDACC__)
  VP_DEVICE float load(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
  VP_DEVICE Float16 store(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
  VP_DEVICE uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
#else
  static float load(Float16 x) {
    _Float16 half;
    memcpy(&half, &x.bits, sizeof half);
    return static_cast<float>(half);
  }
  static Float16 store(float x) {
    const auto half = static_cast<_Float16>(x);
    Float16 out;
    memcpy(&out.bits, &half, sizeof half);
    return out;
  }
  static uint32_t pack(float low, float high) {
    return store(low).bits | static_cast<uint32_t>(store(high).bits) << 16;
  }
#endif
};

#if defined(__CUDACC__)
// From L2: other blocks of this launch wrote it, so a line of this L1 may be stale.
template <class T>
VP_DEVICE T load_fresh(const T* at) {
  return __ldcg(at);
}
// Orders the memory that this thread has seen, also by way of barriers, for the whole GPU.
VP_DEVICE void memory_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Counts up to `limit` and on to 0; what this thread reads next is newer than the counts before.
VP_DEVICE uint32_t count_and_acquire(uint32_t* counter, uint32_t limit) {
  uint32_t before;
  asm volatile("atom.acquire.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(limit)
               : "memory");
  return before;
}
// Waits for the other warps of a team, `threads` in all. Each team of a block has a number of its
// own, from 1 on: 0 is __syncthreads.
VP_DEVICE void team_barrier(int32_t number, int32_t threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
#else
template <class T>
VP_DEVICE T load_fresh(const T* at) {
  return *at;
}
VP_DEVICE void memory_fence() { cusim::memory_fence(); }
VP_DEVICE uint32_t count_and_acquire(uint32_t* counter, uint32_t limit,
                                     cusim::Place place = CUSIM_HERE) {
  const uint32_t before = atomicInc(counter, limit, place);
  cusim::memory_fence();
  return before;
}
VP_DEVICE void team_barrier(int32_t number, int32_t threads, cusim::Place place = CUSIM_HERE) {
  cusim::named_barrier(number, threads, place);
}
#endif

#if defined(__CUDACC__)

// An address in global memory that is computed once, not anew in front of each load.
template <class T>
VP_DEVICE T* computed(T* at) {
  asm("" : "+l"(at));
  __builtin_assume(__isGlobal(at));
  return at;
}
// The same number, of which nothing is computed further up, where registers would have to keep it.
VP_DEVICE int from_here_on(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
VP_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
// For K and V, each read once a step: L2 gives their lines up first, and keeps the stored logits.
VP_DEVICE uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// `valid` of the 16 bytes are read, once; the others become 0.
VP_DEVICE void copy_16(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(valid), "l"(read_once())
               : "memory");
}
// In the same way, what other blocks of this launch wrote: the copy passes L1 by.
VP_DEVICE void copy_fresh(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
}
VP_DEVICE void copy_4(void* to, const void* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
}
VP_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
VP_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

template <class T>
VP_DEVICE T* computed(T* at) {
  return at;
}
VP_DEVICE int from_here_on(int x) { return x; }
VP_DEVICE void copy_16(void* to, const void* from, int valid, cusim::Place place = CUSIM_HERE) {
  cusim::async_copy(to, from, 16, valid, place);
}
VP_DEVICE void copy_fresh(void* to, const void* from, int valid, cusim::Place place = CUSIM_HERE) {
  cusim::async_copy(to, from, 16, valid, place);
  cusim::bytes_read -= valid;  // K, V and stored logits alone are counted
}
VP_DEVICE void copy_4(void* to, const void* from, int valid, cusim::Place place = CUSIM_HERE) {
  cusim::async_copy(to, from, 4, valid, place);
}
VP_DEVICE void copy_commit() { cusim::async_commit(); }
template <int kPending>
VP_DEVICE void copy_wait() {
  cusim::async_wait(kPending);
}

#endif

// All but the last `pending` groups of this thread have landed; at most 7 are told apart.
VP_DEVICE void copy_wait_for(int pending) {
  switch (pending) {
    case 0:
      return copy_wait<0>();
    case 1:
      return copy_wait<1>();
    case 2:
      return copy_wait<2>();
    case 3:
      return copy_wait<3>();
    case 4:
      return copy_wait<4>();
    case 5:
      return copy_wait<5>();
    default:
      return copy_wait<6>();
  }
}

#if defined(__CUDACC__)

VP_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
VP_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
VP_DEVICE uint32_t transpose_matrix(uint32_t value) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(value));
  return out;
}
VP_DEVICE void multiply(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
VP_DEVICE void multiply(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

VP_DEVICE void load_matrices(uint32_t (&out)[4], const void* row, cusim::Place place = CUSIM_HERE) {
  cusim::load_matrices(out, row, false, place);
}
VP_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row,
                                        cusim::Place place = CUSIM_HERE) {
  cusim::load_matrices(out, row, true, place);
}
VP_DEVICE uint32_t transpose_matrix(uint32_t value, cusim::Place place = CUSIM_HERE) {
  return cusim::transpose_matrix(value, place);
}
template <class T>
VP_DEVICE void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        cusim::Place place = CUSIM_HERE) {
  cusim::multiply_16x8x16(
      c, a, b0, b1, [](uint16_t bits) { return Element<T>::load(T{bits}); }, place);
}

#endif

// Blocks of a cluster reach each other's shared memory by address and rank. The rank is the index
// along x modulo the cluster, since clusters lie along x alone. Local and remote access never share
// a pointer: some nvcc miscompile one that may be either.
#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)

VP_DEVICE uint32_t remote_address(const void* local, uint32_t rank) {
  uint32_t at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(at)
               : "r"(shared_address(local)), "r"(rank));
  return at;
}
VP_DEVICE uint32_t remote_load(const uint32_t* local, uint32_t rank) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(value)
               : "r"(remote_address(local, rank))
               : "memory");
  return value;
}
VP_DEVICE void remote_store(uint32_t* local, uint32_t rank, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote_address(local, rank)), "r"(value)
               : "memory");
}
VP_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
// From here on, what the launch before this one wrote is visible.
VP_DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next launch may start its blocks. It still waits for this one's writes.
VP_DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#elif defined(__CUDACC__)

VP_DEVICE uint32_t remote_load(const uint32_t* local, uint32_t) { return *local; }
VP_DEVICE void remote_store(uint32_t* local, uint32_t, uint32_t value) { *local = value; }
VP_DEVICE void cluster_sync() { __syncthreads(); }
VP_DEVICE void wait_for_previous() {}
VP_DEVICE void let_next_start() {}

#else

VP_DEVICE uint32_t remote_load(const uint32_t* local, uint32_t rank,
                               cusim::Place place = CUSIM_HERE) {
  return *cusim::remote(local, rank, place);
}
VP_DEVICE void remote_store(uint32_t* local, uint32_t rank, uint32_t value,
                            cusim::Place place = CUSIM_HERE) {
  *cusim::remote(local, rank, place) = value;
}
VP_DEVICE void cluster_sync(cusim::Place place = CUSIM_HERE) { cusim::cluster_barrier(place); }
VP_DEVICE void wait_for_previous() {}
VP_DEVICE void let_next_start() {}

#endif

}  // namespace visionpulse::cuda
