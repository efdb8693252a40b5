// SPDX-License-Identifier: Apache-2.0
// The fastest reads of memory: the ceilings that benchmarks compare the kernels with.
#pragma once

#include "kernels/common/float_bits.h"
#include "kernels/cpu/call.h"
#include "kernels/cpu/prefetch.inl.h"

namespace visionpulse::cpu::VP_ISA {

constexpr int kProbeVecs = 8;  // of a step of a stream; a short vector takes half a step
constexpr int64_t kProbeBytes = int64_t{kProbeVecs} * kWidth * 4;

// Maxima, one instruction a load, so nothing but the loads takes time. Their bits only keep the
// compiler from leaving the loads out.
struct Maxima {
  Vec largest[kProbeVecs];

  VP_INLINE void reset(Maxima& m) {
    for (int i = 0; i < kProbeVecs; ++i) m.largest[i] = vzero();
  }
  VP_INLINE void take_short(Maxima& m, const char* bytes, int64_t count) {
    const float* p = reinterpret_cast<const float*>(bytes);
    for (int i = 0; (i + 1) * kWidth * 4 <= count; ++i)
      m.largest[i] = vmax_number(vload(p + i * kWidth), m.largest[i]);
  }
  // Whole steps of kProbeBytes; the last one may lie across the one before it.
  VP_INLINE void take(Maxima& m, const char* bytes, int64_t count) {
    if (count < kProbeBytes) return take_short(m, bytes, count);
    for (int64_t at = 0; at < count; at += kProbeBytes) {
      const char* from = bytes + (at + kProbeBytes <= count ? at : count - kProbeBytes);
      const float* p = reinterpret_cast<const float*>(from);
      for (int i = 0; i < kProbeVecs; ++i)
        m.largest[i] = vmax_number(vload(p + i * kWidth), m.largest[i]);
    }
  }
  VP_INLINE uint64_t bits(const Maxima& m) {
    alignas(64) float lanes[kWidth];
    uint64_t bits = 0;
    for (int i = 0; i < kProbeVecs; ++i) {
      vstore(lanes, m.largest[i]);
      for (int j = 0; j < kWidth; ++j) bits ^= float_bits(lanes[j]);
    }
    return bits;
  }
};

// Left to the hardware's prefetcher, or with `pages` whole pages asked for ahead, a line of each in
// turn, whichever the caller finds faster.
static uint64_t read_bytes(const void* bytes, int64_t count, int pages) {
  const char* const from = static_cast<const char*>(bytes);
  const int64_t window = int64_t{pages} * kPage;
  Maxima maxima;
  Maxima::reset(maxima);
  int64_t at = 0;
  for (; pages > 0 && at + 2 * window <= count; at += window) {
    const char* const ahead = from + at + window;
    for (int64_t line = 0; line < window / kLine;) {
      for (const int64_t end = line + kProbeBytes / kLine; line < end; ++line)
        prefetch_lines<1>(ahead + line % pages * kPage + line / pages * kLine);
      Maxima::take(maxima, from + at + line * kLine - kProbeBytes, kProbeBytes);
    }
  }
  Maxima::take(maxima, from + at, count - at);
  return Maxima::bits(maxima);
}

// K and V of key i by turns, or K of `block` keys and then their V, whichever the caller finds
// faster; prefetched as many keys ahead.
static uint64_t read_scattered(const GatherProbe& p, int64_t first, int64_t end) {
  const int lines = (p.bytes + kLine - 1) / kLine;
  const int64_t ahead = p.ahead < 0 ? -p.ahead : p.ahead, block = p.ahead < 0 ? ahead : 1;
  const int64_t last = int64_t{p.heads} * p.count;
  const auto offset = [&](int64_t key) {
    return key / p.count * p.head_stride + p.positions[key % p.count] * p.token_stride;
  };
  Maxima maxima;
  Maxima::reset(maxima);
  for (int64_t key = first; key < first + ahead && key < end; ++key) {
    prefetch_vector(p.k + offset(key), lines);
    prefetch_vector(p.v + offset(key), lines);
  }
  for (int64_t begin = first; begin < end; begin += block) {
    const int64_t stop = begin + block < end ? begin + block : end;
    for (int of = 0; of < 2; ++of) {
      const char* const from = of == 0 ? p.k : p.v;
      for (int64_t key = begin; key < stop; ++key) {
        if (ahead > 0 && key + ahead < last) prefetch_vector(from + offset(key + ahead), lines);
        Maxima::take(maxima, from + offset(key), p.bytes);
      }
    }
  }
  return Maxima::bits(maxima);
}

}  // namespace visionpulse::cpu::VP_ISA
