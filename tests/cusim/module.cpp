// SPDX-License-Identifier: Apache-2.0
// The CUDA engine on a simulated GPU, as the submodule `cuda` of a Python module of its own.
#include "csrc/cuda/bind.h"

PYBIND11_MODULE(_cusim, m) {
  m.attr("has_cuda") = true;
  visionpulse::cuda::register_cuda(m);
  m.def("configure", [](unsigned seed, bool early) {
    cusim::settings.seed = seed;
    cusim::settings.early = early;
  });
  m.def("plug_in", [](int capability, int multiprocessors, int shared_bytes) {
    cusim::gpu = {capability, multiprocessors, shared_bytes};
  });
}
