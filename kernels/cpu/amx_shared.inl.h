// SPDX-License-Identifier: Apache-2.0
// The products of several queries by AMX, in the place of dot_heads and sum_heads: 16 heads fill a
// tile, and the layouts of shared_stream.inl.h are those of tiles already.
#pragma once

#include "kernels/cpu/amx_values.inl.h"

namespace visionpulse::cpu::VP_ISA {

// From pairs of keys [16 pairs, 16 heads] to [16 heads, 16 pairs].
VP_INLINE void amx_transpose(const float* pairs, bf16* to) {
  __m512i row[16], two[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(pairs + i * kLanes);
  for (int i = 0; i < 16; i += 2) {
    two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  // four pairs of heads h, h + 4, h + 8, h + 12
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + 2 + j]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + 2 + j]);
    }
  for (int h = 0; h < 4; ++h) {
    const __m512i a = _mm512_shuffle_i32x4(row[h], row[4 + h], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(row[h], row[4 + h], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(row[8 + h], row[12 + h], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(row[8 + h], row[12 + h], 0xdd);
    _mm512_store_si512(to + h * kAmxKeys, _mm512_shuffle_i32x4(a, d, 0x88));
    _mm512_store_si512(to + (4 + h) * kAmxKeys, _mm512_shuffle_i32x4(b, e, 0x88));
    _mm512_store_si512(to + (8 + h) * kAmxKeys, _mm512_shuffle_i32x4(a, d, 0xdd));
    _mm512_store_si512(to + (12 + h) * kAmxKeys, _mm512_shuffle_i32x4(b, e, 0xdd));
  }
}

template <class T>
VP_INLINE void amx_dot_heads(const bf16* q, const bf16* const* k, int keys, int columns,
                             const Scaling& scaling, Prefetch<T>& prefetch, float* x) {
  alignas(64) bf16 space[2][kAmxRows * kMaxHeadDim];
  const AmxRows low = amx_rows(k, columns, space[0]);
  const AmxRows high = amx_rows(k + kAmxRows, columns, space[1]);
  // as many as dot_heads: the passes of stream_shared are counted in steps of kDepth pairs
  const auto fetch = [&] { Prefetch<T>::fetch(prefetch, keys * kAmxColumns / (2 * kDepth)); };
  amx_dots(q, kLanes, columns / kAmxColumns, low, high, fetch, x, x + kAmxRows * kLanes);
  for (int n = 0; n < keys; ++n) vstore(x + n * kLanes, logit(vload(x + n * kLanes), scaling));
}

// V of 32 keys as pairs: a tile of 16 pairs and 16 columns at `first`, and the bytes from a pair to
// the next and from a tile to the next.
struct AmxValues {
  const char* first;
  int64_t to_pair, to_tile;
};

// acc [heads, columns] = acc * rescale + weights [heads, 32 keys] * V; an even number of tiles.
VP_INLINE void amx_add_values(const bf16* weights, const AmxValues& v, int heads, int columns,
                              const float* rescale, float* acc) {
  alignas(64) float sums[2][kAmxHeads * kLanes];
  amx_fence();
  _tile_loadd(5, weights, kAmxRowBytes);
#pragma GCC unroll 1
  for (int d = 0; d < columns; d += 2 * kLanes) {
    const char* const tile = v.first + d / kLanes * v.to_tile;
    _tile_zero(6);
    _tile_zero(7);
    _tile_loadd(1, tile, v.to_pair);
    _tile_dpbf16ps(6, 5, 1);
    _tile_loadd(2, tile + v.to_tile, v.to_pair);
    _tile_dpbf16ps(7, 5, 2);
    _tile_stored(6, sums[0], kAmxRowBytes);
    _tile_stored(7, sums[1], kAmxRowBytes);
    amx_fence();
    for (int h = 0; h < heads; ++h) {
      float* to = acc + h * columns + d;
      const Vec scale = vset(rescale[h]);
      vstore(to, vfma(vload(to), scale, vload(sums[0] + h * kLanes)));
      vstore(to + kLanes, vfma(vload(to + kLanes), scale, vload(sums[1] + h * kLanes)));
    }
  }
}

template <class T>
VP_INLINE void amx_sum_heads(const Staged<T>& staged, int keys, float* x, int heads,
                             const float* rescale, float* acc, int columns) {
  alignas(64) bf16 weights[kAmxHeads * kAmxKeys];
  for (int n = keys; n < kAmxKeys; ++n) vstore(x + n * kLanes, vzero());
  pack_neighbours(x, kLanes, kAmxKeys);
  amx_transpose(x, weights);
  const AmxValues values = {reinterpret_cast<const char*>(staged.v_space),
                            columns * static_cast<int64_t>(sizeof(float)), kAmxRowBytes};
  amx_add_values(weights, values, heads, columns, rescale, acc);
}

#define VP_AMX_HEADS(T)                                                                           \
  template <>                                                                                     \
  VP_SPECIALIZED void dot_heads<T, 1>(const bf16* q, const bf16* const* k, int keys, int columns, \
                                      const Scaling& scaling, Prefetch<T>& prefetch, float* x) {  \
    amx_dot_heads<T>(q, k, keys, columns, scaling, prefetch, x);                                  \
  }                                                                                               \
  template <>                                                                                     \
  VP_SPECIALIZED void sum_heads<T>(const Staged<T>& staged, int keys, float* x, int, int heads,   \
                                   const float* rescale, float* acc, int columns) {               \
    amx_sum_heads<T>(staged, keys, x, heads, rescale, acc, columns);                              \
  }
VP_AMX_HEADS(amx_bf16)
VP_AMX_HEADS(amx_f8)
#undef VP_AMX_HEADS

}  // namespace visionpulse::cpu::VP_ISA
