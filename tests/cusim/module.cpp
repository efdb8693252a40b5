// SPDX-License-Identifier: Apache-2.0
// The CUDA engine on a simulated GPU, as the submodule `cuda` of a Python module of its own.
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "csrc/cuda/bind.h"
#include "kernels/cuda/work.cuh"
#include "nvtx3/nvToolsExt.h"

namespace py = pybind11;

namespace {

// (compute capability, multiprocessors, shared bytes of a block, and what the kernels were compiled
// for where that is older)
visionpulse::cuda::Chip chip_of(const std::vector<int>& of) {
  return {of.at(0), of.size() > 3 ? of[3] : of.at(0), of.at(1), of.at(2)};
}

}  // namespace

PYBIND11_MODULE(_cusim, m) {
  m.attr("has_cuda") = true;
  visionpulse::cuda::register_cuda(m);
  m.def("configure", [](unsigned seed, bool early) {
    cusim::settings.seed = seed;
    cusim::settings.early = early;
  });
  // A capture under way: 0 none, 1 where relaxed mode lets kernels be loaded, 2 where nothing does.
  m.def("capture", [](int what) { cusim::capture = static_cast<cusim::Capture>(what); });
  m.def("current_device", [] { return cusim::current; });
  // Bytes of K, V and stored logits read since the last call.
  m.def("bytes_read", [] { return std::exchange(cusim::bytes_read, 0); });
  m.def("bulk_bytes", [] { return std::exchange(cusim::bulk_bytes, 0); });
  // Kernels launched since the last call.
  m.def("launches", [] { return std::exchange(cusim::launches, 0); });
  // Names of the ranges since the last call.
  m.def("ranges", [] { return std::exchange(cusim::ranges, {}); });
  // The plan of a stage on a chip, for tests of the host functions.
  m.def(
      "plan",
      [](bool score, const std::vector<int>& chip, const std::array<int, 6>& shape, bool keys,
         bool values, bool listed) {
        using namespace visionpulse::cuda;
        const auto stage = score ? Stage::kScore : Stage::kAttend;
        const auto kind = static_cast<Kind>(shape[0]);
        const StreamPlan plan = plan_stream(
            stage, chip_of(chip), {kind, shape[1], shape[2], shape[3], shape[4], shape[5]},
            {keys, values, listed});
        py::dict of;
        of["kernel"] = std::string(plan.kernel->name);
        of["head_tile"] = plan.kernel->head_tile;
        of["warp_heads"] = plan.kernel->warp.heads;
        of["team"] = plan.team;
        of["warps"] = plan.warps;
        of["stages"] = plan.stages;
        of["stage_bytes"] = plan.k_bytes + plan.v_bytes;
        of["shared_bytes"] = plan.shared_bytes;
        of["rule"] = py::make_tuple(plan.rule.target_parts, plan.rule.shortest, plan.rule.tile);
        of["merge"] = py::make_tuple(plan.merge.at_once, plan.merge.fan, plan.merge.steps);
        of["max_splits"] = plan.max_splits;
        return of;
      },
      py::arg("score"), py::arg("chip"), py::arg("shape"), py::arg("keys"), py::arg("values"),
      py::arg("listed") = false);
  m.def("splits", [](const std::array<int, 3>& of, int keys, int blocks) {
    const visionpulse::SplitRule rule = {of[0], of[1], 1 << 30, of[2]};
    return visionpulse::split_count(keys, visionpulse::split_length(rule, keys, blocks));
  });
  // Keys of a part, as the rule says and as a kernel computes them.
  m.def("split_lengths", [](const std::array<int, 3>& of, int keys, int blocks) {
    visionpulse::cuda::StreamArgs args = {};
    args.rule = {of[0], of[1], 1 << 30, of[2]};
    args.kv_heads = blocks;
    args.parts_reciprocal = visionpulse::cuda::reciprocal_of(of[0]);
    return std::make_pair(visionpulse::split_length(args.rule, keys, blocks),
                          visionpulse::cuda::keys_of_split(args, keys));
  });
  m.def("plan_select", [](const std::vector<int>& chip, int candidates) {
    const auto plan = visionpulse::cuda::plan_select(chip_of(chip), candidates);
    py::dict of;
    of["cluster"] = plan.cluster;
    of["blocks"] = plan.blocks;
    of["cached"] = plan.cached;
    of["shared_bytes"] = plan.shared_bytes;
    of["codes_stride"] = plan.codes_stride;
    of["histograms"] = plan.histograms;
    return of;
  });
  m.def("bulk_copies", [](const std::vector<int>& chip, int requested) {
    using namespace visionpulse::cuda;
    return bulk_copies(chip_of(chip), static_cast<Copies>(requested));
  });
  m.def("plug_in", [](int capability, int multiprocessors, int shared_bytes) {
    cusim::gpu = {capability, multiprocessors, shared_bytes};
  });
}
