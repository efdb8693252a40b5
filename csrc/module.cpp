// SPDX-License-Identifier: Apache-2.0
// The Python module: addresses and host numbers in, nothing of any framework.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/engine.h"

namespace py = pybind11;

namespace {

using namespace visionpulse;

// Reads a tuple from left to right; the layouts are those of visionpulse/backends/cpu.py.
class Reader {
 public:
  Reader(const py::tuple& items, py::ssize_t expected) : items_(items) {
    if (items.size() != static_cast<size_t>(expected))
      throw std::invalid_argument("expected a tuple of " + std::to_string(expected) + " numbers, got " +
                                  std::to_string(items.size()));
  }
  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  int32_t small() { return static_cast<int32_t>(integer()); }
  float number() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<float>(value);
  }
  template <class T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
  Strides strides() { return {integer(), integer(), integer()}; }

 private:
  PyObject* next() { return PyTuple_GET_ITEM(items_.ptr(), at_++); }
  const py::tuple& items_;
  py::ssize_t at_ = 0;
};

void read_query(cpu::Call& c, const py::tuple& items) {
  Reader r(items, 8);
  c.q = r.address<const void>();
  c.q_row = r.integer();
  c.q_head = r.integer();
  c.dtype = static_cast<DType>(r.small());
  c.B = r.small();
  c.H = r.small();
  c.G = r.small();
  c.D = r.small();
  if (static_cast<uint32_t>(c.dtype) > 2 || c.D < 1 || c.D > cpu::kMaxHeadDim || c.G < 1 ||
      c.H % c.G != 0 || c.H / c.G > cpu::kMaxGroup)
    throw std::invalid_argument("query shape or dtype outside what the kernels serve");
}

void read_cache(CacheArgs& a, const py::tuple& items) {
  Reader r(items, 15);
  a.k = r.address<const void>();
  a.v = r.address<const void>();
  a.starts = r.address<const int32_t>();
  a.lengths = r.address<const int32_t>();
  a.table = r.address<const int32_t>();
  a.table_stride = r.integer();
  a.k_stride = r.strides();
  a.v_stride = r.strides();
  a.capacity = r.small();
  a.page_size = r.small();
  a.pages = r.small();
}

void read_visual(VisualArgs& v, const py::tuple& items) {
  Reader r(items, 3);
  v.spans = r.address<const int32_t>();
  v.offsets = r.address<const int32_t>();
  v.spans_per_row = r.small();
}

void read_params(ScoreArgs& s, const py::tuple& items) {
  Reader r(items, 11);
  s.scale = r.number();
  s.softcap = r.number();
  s.window = r.small();
  s.tau = r.number();
  s.r_min = r.number();
  s.r_max = r.number();
  s.mean_mass = r.integer() != 0;
  s.kind = static_cast<ScoreKind>(r.small());
  s.k_max = r.small();
  s.ratio = r.address<const float>();
  s.wanted = r.address<const int32_t>();
}

void read_out(cpu::Call& c, const py::tuple& items) {
  Reader r(items, 3);
  c.out = r.address<void>();
  c.out_row = r.integer();
  c.out_head = r.integer();
}

void read_chosen(cpu::Call& c, const py::tuple& items) {
  Reader r(items, 4);
  c.indices = r.address<int32_t>();
  c.counts = r.address<int32_t>();
  c.mass = r.address<float>();
  c.mass_mean = r.address<float>();
}

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
              const py::tuple& params, const py::tuple& chosen, const py::tuple& out, uintptr_t scores,
              const py::tuple& scratch) {
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
}
