// SPDX-License-Identifier: Apache-2.0
// The part of the device layer for 8-bit floats (e4m3: 1 sign, 4 exponent and 3 mantissa bits, NaN
// and no infinities). float16 holds each of them exactly, so all arithmetic starts from there.
#pragma once

#include "kernels/cuda/device.cuh"

namespace visionpulse::cuda {

struct E4m3 {
  uint8_t bits;
};

template <>
struct Element<E4m3> {
  static constexpr int kChunk = 16;
};

// Four float16: two words of two, the lower half first.
struct FourHalves {
  uint32_t low, high;
};

#if defined(__CUDACC__)
VP_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
VP_DEVICE uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
VP_DEVICE float2 floats_of(uint32_t halves) {
  return {__half2float(__ushort_as_half(halves & 0xffff)),
          __half2float(__ushort_as_half(halves >> 16))};
}
#else
static inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= (both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return word;
}
static inline float2 floats_of(uint32_t halves) {
  return {Element<Float16>::load({static_cast<uint16_t>(halves)}),
          Element<Float16>::load({static_cast<uint16_t>(halves >> 16)})};
}
static inline uint32_t multiply_halves(uint32_t a, uint32_t b) {
  const float2 x = floats_of(a), y = floats_of(b);
  return Element<Float16>::pack(x.x * y.x, x.y * y.y);
}
#endif

// Four e4m3, exactly.
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
VP_DEVICE FourHalves widen(uint32_t bytes) {
  FourHalves of;
  asm("{\n.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(of.low), "=r"(of.high)
      : "r"(bytes));
  return of;
}
#else
// The bits moved to their places in a float16 say 2^-8 of the number, subnormal ones too. NaN,
// which would be 480, gets the exponent of a NaN by the bit that 0x7f + 1 carries to.
VP_DEVICE FourHalves widen(uint32_t bytes) {
  const uint32_t nan = (bytes & 0x7f7f7f7f) + 0x01010101;
  const auto two = [&](uint32_t selector) {  // bytes to the upper ends of halves
    const uint32_t upper = pick_bytes(bytes, 0, selector), of_nan = pick_bytes(nan, 0, selector);
    const uint32_t moved = (upper >> 1 & 0x3f803f80) | (of_nan >> 1 & 0x40004000);
    return multiply_halves(moved | (upper & 0x80008000), 0x5c005c00);
  };
  return {two(0x1404), two(0x3424)};
}
#endif

VP_DEVICE float4 floats_of_e4m3(uint32_t bytes) {
  const FourHalves halves = widen(bytes);
  const float2 low = floats_of(halves.low), high = floats_of(halves.high);
  return {low.x, low.y, high.x, high.y};
}

}  // namespace visionpulse::cuda
