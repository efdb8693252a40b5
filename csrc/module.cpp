// SPDX-License-Identifier: Apache-2.0
// The Python module: addresses and host numbers in, nothing of any framework.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/engine.h"
#include "csrc/reader.h"
#if VP_HAVE_CUDA
#include "csrc/cuda/bind.h"
#endif

namespace py = pybind11;

namespace {

using namespace visionpulse;

cpu::Scratch read_scratch(const py::tuple& items) {
  Reader r(items, 3);
  cpu::Scratch scratch;
  scratch.bytes = r.address<void>();
  scratch.size = r.integer();
  scratch.threads = r.small();
  return scratch;
}

cpu::Call read_call(const py::tuple& query, const py::tuple& cache, const py::tuple& visual,
                    const py::tuple& params) {
  cpu::Call c = {};
  read_query(c, query);
  read_cache(c.cache, cache);
  read_visual(c.visual, visual);
  read_params(c.score, params);
  return c;
}

int64_t attend(const py::tuple& query, const py::tuple& cache, const py::tuple& visual,
               const py::tuple& selection, const py::tuple& params, const py::tuple& out,
               const py::tuple& scratch) {
  cpu::Call c = read_call(query, cache, visual, params);
  Reader r(selection, 3);
  c.selection.indices = r.address<const int32_t>();
  c.selection.counts = r.address<const int32_t>();
  c.selection.k_max = r.small();
  read_out(c, out);
  const cpu::Scratch memory = read_scratch(scratch);
  const cpu::Kernels& kernels = cpu::current();
  py::gil_scoped_release unlocked;
  return cpu::attend(kernels, c, memory);
}

int64_t score(const py::tuple& query, const py::tuple& cache, const py::tuple& visual,
              const py::tuple& params, const py::tuple& chosen, const py::tuple& out,
              uintptr_t scores, const py::tuple& scratch) {
  cpu::Call c = read_call(query, cache, visual, params);
  read_chosen(c, chosen);
  read_out(c, out);
  const cpu::Scratch memory = read_scratch(scratch);
  const cpu::Kernels& kernels = cpu::current();
  py::gil_scoped_release unlocked;
  return cpu::score(kernels, c, reinterpret_cast<float*>(scores), memory);
}

int64_t choose(int rows, int capacity, uintptr_t starts, uintptr_t lengths, const py::tuple& visual,
               const py::tuple& params, const py::tuple& chosen, uintptr_t scores,
               const py::tuple& scratch) {
  cpu::Call c = {};
  c.B = rows;
  c.H = c.G = c.D = 1;
  c.cache.capacity = capacity;
  c.cache.starts = reinterpret_cast<const int32_t*>(starts);
  c.cache.lengths = reinterpret_cast<const int32_t*>(lengths);
  read_visual(c.visual, visual);
  read_params(c.score, params);
  read_chosen(c, chosen);
  const cpu::Scratch memory = read_scratch(scratch);
  const cpu::Kernels& kernels = cpu::current();
  py::gil_scoped_release unlocked;
  return cpu::choose(kernels, c, reinterpret_cast<const float*>(scores), memory);
}

int64_t decode(const py::tuple& query, const py::tuple& cache, const py::tuple& visual,
               const py::tuple& params, const py::tuple& chosen, const py::tuple& out, bool dense,
               uintptr_t scores, const py::tuple& scratch) {
  cpu::Call c = read_call(query, cache, visual, params);
  read_chosen(c, chosen);
  read_out(c, out);
  const cpu::Scratch memory = read_scratch(scratch);
  const cpu::Kernels& kernels = cpu::current();
  py::gil_scoped_release unlocked;
  return cpu::decode(kernels, c, dense, reinterpret_cast<float*>(scores), memory);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const cpu::Kernels* kernels : cpu::available()) names.emplace_back(kernels->name);
  return names;
}

uint64_t read_bytes(uintptr_t address, int64_t count) {
  py::gil_scoped_release unlocked;
  return cpu::current().read(reinterpret_cast<const void*>(address), count);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("has_cuda") = static_cast<bool>(VP_HAVE_CUDA);
  py::module_ cpu_module = m.def_submodule("cpu");
  cpu_module.def("attend", &attend);
  cpu_module.def("score", &score);
  cpu_module.def("choose", &choose);
  cpu_module.def("decode", &decode);
  cpu_module.def("instruction_sets", &instruction_sets);
  cpu_module.def("instruction_set", [] { return std::string(cpu::current().name); });
  cpu_module.def("use_instruction_set", &cpu::use);
  cpu_module.def("read_bytes", &read_bytes);
#if VP_HAVE_CUDA
  cuda::register_cuda(m);
#endif
}
