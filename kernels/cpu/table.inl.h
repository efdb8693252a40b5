// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set. A file of isa/ names the set and includes its simd file first.
#include "kernels/cpu/stream.inl.h"
#include "kernels/cpu/attend.inl.h"
#include "kernels/cpu/shared_stream.inl.h"
#include "kernels/cpu/merge.inl.h"
#include "kernels/cpu/score.inl.h"
#include "kernels/cpu/shared_score.inl.h"
#include "kernels/cpu/select.inl.h"
#include "kernels/cpu/probe.inl.h"

namespace visionpulse::cpu::VP_ISA {

static void run_plainly(const Call&, void (*run)(void* context), void* context) { run(context); }

// Head tiles of 1, 2 or 4, by the group size.
template <class T>
static void stream_any(const Call& c, int row, int kv_head, int part, Run run) {
  switch (tile_heads(c.H / c.G)) {
    case 1:
      return stream_part<T, 1>(c, row, kv_head, part, run);
    case 2:
      return stream_part<T, 2>(c, row, kv_head, part, run);
    default:
      return stream_part<T, 4>(c, row, kv_head, part, run);
  }
}

template <class T>
static void weigh_any(const Call& c, int row, int kv_head, int part, Run run) {
  switch (tile_heads(c.H / c.G)) {
    case 1:
      return weigh_part<T, 1>(c, row, kv_head, part, run);
    case 2:
      return weigh_part<T, 2>(c, row, kv_head, part, run);
    default:
      return weigh_part<T, 4>(c, row, kv_head, part, run);
  }
}

static void score_any(const Call& c, int row, int chunk) {
  switch (tile_heads(c.H / c.G)) {
    case 1:
      return score_kind<1>(c, row, chunk);
    case 2:
      return score_kind<2>(c, row, chunk);
    default:
      return score_kind<4>(c, row, chunk);
  }
}

}  // namespace visionpulse::cpu::VP_ISA

// Kernels of a storage type each, in the order of storage_of.
#define VP_STORED(KERNEL) \
  {KERNEL<float>, KERNEL<bf16>, KERNEL<f16>, KERNEL<f8>, KERNEL<f8_beside_bf16>}
#define VP_KERNELS(NAME)                                                              \
  {NAME,                                                                              \
   kUnit,                                                                             \
   kWidth,                                                                            \
   Weigh<bf16>::kKeys == 2,                                                           \
   run_plainly,                                                                       \
   VP_STORED(stream_any),                                                             \
   VP_STORED(weigh_any),                                                              \
   VP_STORED(stream_shared),                                                          \
   VP_STORED(pack_queries),                                                           \
   {merge_parts<float, float>, merge_parts<bf16, bf16>, merge_parts<f16, f16>},       \
   {merge_parts<float, f8>, merge_parts<bf16, f8_beside_bf16>, merge_parts<f16, f8>}, \
   row_statistics,                                                                    \
   score_any,                                                                         \
   score_chunk_of_queries,                                                            \
   select_row,                                                                        \
   read_bytes,                                                                        \
   read_scattered}
