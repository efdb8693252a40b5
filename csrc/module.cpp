// SPDX-License-Identifier: Apache-2.0
// The Python module _C: tensors as DLPack shows them, or their addresses; no header of any
// framework.
#include <pybind11/pybind11.h>

#include "csrc/cpu/bind.h"
#if VP_HAVE_CUDA
#include "csrc/cuda/bind.h"
#endif

PYBIND11_MODULE(_C, m) {
  m.attr("has_cuda") = static_cast<bool>(VP_HAVE_CUDA);
  m.attr("binding") = VP_BINDING;  // path:sha256 of each source of the binding
  visionpulse::cpu::register_cpu(m);
#if VP_HAVE_CUDA
  visionpulse::cuda::register_cuda(m);
#endif
}
