// SPDX-License-Identifier: Apache-2.0
// The CUDA engine on a simulated GPU, as the submodule `cuda` of a Python module of its own.
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "csrc/cuda/bind.h"

namespace py = pybind11;

PYBIND11_MODULE(_cusim, m) {
  m.attr("has_cuda") = true;
  visionpulse::cuda::register_cuda(m);
  m.def("configure", [](unsigned seed, bool early) {
    cusim::settings.seed = seed;
    cusim::settings.early = early;
  });
  // Bytes of K, V and kept logits read since the last call.
  m.def("bytes_read", [] { return std::exchange(cusim::bytes_read, 0); });
  // The plan of a stage on a chip, for tests of the host functions.
  m.def("plan", [](bool score, const std::array<int, 3>& chip, const std::array<int, 6>& shape,
                   bool keys, bool values) {
    using namespace visionpulse::cuda;
    const auto stage = score ? Stage::kScore : Stage::kAttend;
    const auto dtype = static_cast<visionpulse::DType>(shape[0]);
    const StreamPlan plan =
        plan_stream(stage, {chip[0], chip[1], chip[2]},
                    {dtype, shape[1], shape[2], shape[3], shape[4], shape[5]}, {keys, values});
    py::dict of;
    of["kernel"] = std::string(plan.kernel->name);
    of["row_tile"] = plan.kernel->row_tile;
    of["head_blocks"] = plan.head_blocks;
    of["block_heads"] = plan.block_heads;
    of["warps"] = plan.warps;
    of["stages"] = plan.stages;
    of["stage_bytes"] = plan.k_bytes + plan.v_bytes;
    of["shared_bytes"] = plan.shared_bytes;
    of["wanted"] = plan.rule.wanted;
    of["tile"] = plan.rule.tile;
    of["max_splits"] = plan.max_splits;
    return of;
  });
  m.def("splits", [](int wanted, int tile, int keys, int blocks) {
    const visionpulse::SplitRule rule = {wanted, tile, 1 << 30, tile};
    return visionpulse::split_count(keys, visionpulse::split_length(rule, keys, blocks));
  });
  m.def("plan_select", [](const std::array<int, 3>& chip, int candidates) {
    const auto plan = visionpulse::cuda::plan_select({chip[0], chip[1], chip[2]}, candidates);
    return py::make_tuple(plan.cluster, plan.cached, plan.shared_bytes);
  });
  m.def("plug_in", [](int capability, int multiprocessors, int shared_bytes) {
    cusim::gpu = {capability, multiprocessors, shared_bytes};
  });
}
