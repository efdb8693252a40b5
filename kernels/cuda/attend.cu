// SPDX-License-Identifier: Apache-2.0
// Attention over all keys, or over text and a list; with kept logits in place of K, over V alone.
#include "kernels/cuda/entries.cuh"
#include "kernels/cuda/stream.cuh"

namespace visionpulse::cuda {

#define VP_ENTRY(dtype, type, d, r)                       \
  VP_KERNEL(kMaxWarps* kThreadsPerWarp, kResidentStreams) \
  vp_attend_##dtype##_d##d##_r##r(VP_ARGS(StreamArgs) args) { stream<type, d, r, false>(args); }
VP_STREAM_KERNELS(VP_ENTRY)
#undef VP_ENTRY

const StreamKernel* attend_kernel(DType dtype, int32_t head_dim, int32_t row_tile) {
#define VP_ENTRY(dtype_name, type, d, r)                                                           \
  if (dtype == kDType_##dtype_name && head_dim == d && row_tile == r) {                            \
    static const StreamKernel kernel =                                                             \
        describe<type, d, r>(reinterpret_cast<const void*>(&vp_attend_##dtype_name##_d##d##_r##r), \
                             "vp_attend_" #dtype_name "_d" #d "_r" #r);                            \
    return &kernel;                                                                                \
  }
  VP_STREAM_KERNELS(VP_ENTRY)
#undef VP_ENTRY
  return nullptr;
}

}  // namespace visionpulse::cuda
