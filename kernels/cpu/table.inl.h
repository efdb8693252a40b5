// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set. Its .cpp names the set and includes its simd file before this
// one.
#include "kernels/cpu/attend.inl.h"
#include "kernels/cpu/score.inl.h"
#include "kernels/cpu/select.inl.h"

namespace visionpulse::cpu::VP_ISA {

// Head tiles of 1, 2 or 4, by the group size.
template <class T>
static void stream_any(const Call& c, int row, int kv_head, int part) {
  switch (tile_heads(c.H / c.G)) {
    case 1:
      return stream_part<T, 1>(c, row, kv_head, part);
    case 2:
      return stream_part<T, 2>(c, row, kv_head, part);
    default:
      return stream_part<T, 4>(c, row, kv_head, part);
  }
}

template <class T>
static void weigh_any(const Call& c, int row, int kv_head, int part) {
  switch (tile_heads(c.H / c.G)) {
    case 1:
      return weigh_part<T, 1>(c, row, kv_head, part);
    case 2:
      return weigh_part<T, 2>(c, row, kv_head, part);
    default:
      return weigh_part<T, 4>(c, row, kv_head, part);
  }
}

static void score_any(const Call& c, int row, int chunk) {
  switch (tile_heads(c.H / c.G)) {
    case 1:
      return rank_kind<1>(c, row, chunk);
    case 2:
      return rank_kind<2>(c, row, chunk);
    default:
      return rank_kind<4>(c, row, chunk);
  }
}

}  // namespace visionpulse::cpu::VP_ISA

// One row per storage type, in the order of DType.
#define VP_KERNELS(NAME)                                      \
  {NAME,                                                      \
   kUnit,                                                     \
   {stream_any<float>, stream_any<bf16>, stream_any<f16>},    \
   {weigh_any<float>, weigh_any<bf16>, weigh_any<f16>},       \
   {finish_head<float>, finish_head<bf16>, finish_head<f16>}, \
   row_statistics,                                            \
   score_any,                                                 \
   choose_row,                                                \
   read_bytes}
