// SPDX-License-Identifier: Apache-2.0
// The score stage. One pass over K stores logits, sums the softmax at 1 and at tau, and with V
// makes the dense output. score_finish.cu turns stored logits into scores.
#include "kernels/cuda/entries.cuh"
#include "kernels/cuda/stream.cuh"

namespace visionpulse::cuda {

#define VP_ENTRY(kind, type, d, h)                                  \
  VP_KERNEL(kMaxWarps* kThreadsPerWarp, (kResidentFor<type, d, h>)) \
  vp_score_##kind##_d##d##_h##h(VP_ARGS(StreamArgs) args) { stream<type, d, h, true>(args); }
VP_DEFINED(VP_ENTRY)
#undef VP_ENTRY

#ifdef VP_LISTS_ALL
#define VP_ENTRY(kind, type, d, h) \
  extern "C" VP_GLOBAL void vp_score_##kind##_d##d##_h##h(VP_ARGS(StreamArgs) args);
VP_STREAM_KERNELS(VP_ENTRY)
#undef VP_ENTRY

const StreamKernel* score_kernel(Kind kind, int32_t head_dim, int32_t head_tile) {
#define VP_ENTRY(kind_name, type, d, h)                                                          \
  if (kind == kKind_##kind_name && head_dim == d && head_tile == h) {                            \
    static const StreamKernel kernel =                                                           \
        describe<type, d, h>(reinterpret_cast<const void*>(&vp_score_##kind_name##_d##d##_h##h), \
                             "vp_score_" #kind_name "_d" #d "_h" #h);                            \
    return &kernel;                                                                              \
  }
  VP_STREAM_KERNELS(VP_ENTRY)
#undef VP_ENTRY
  return nullptr;
}

#endif

}  // namespace visionpulse::cuda
