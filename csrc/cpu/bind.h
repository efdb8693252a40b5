// SPDX-License-Identifier: Apache-2.0
// The CPU entries of the Python module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/engine.h"
#include "csrc/cpu/pages.h"
#include "csrc/cpu/pool.h"
#include "csrc/cpu/probe.h"
#include "csrc/cpu/read_call.h"

namespace visionpulse::cpu {

// Scratch memory, then how many threads may run.
inline Scratch read_scratch(Given& given) {
  const Tensor bytes = given.tensor(1);
  return {bytes.address(), bytes.shape[0], given.threads()};
}

// Runs an op without the GIL.
template <class Op>
int64_t unlocked(const Scratch& scratch, Op op) {
  const Kernels& kernels = current();
  py::gil_scoped_release released;
  return op(kernels, scratch);
}

inline int64_t bound_attend(Given given) {
  Call c = {};
  read_queries(c, given);
  read_cache(c, given);
  read_visual(c.visual, given);
  c.selection = read_selection(given);
  Numbers(given.next()).read_attention(c.score);
  return unlocked(read_scratch(given), [&](const Kernels& kernels, const Scratch& memory) {
    return attend(kernels, c, memory);
  });
}

inline int64_t bound_score(Given given) {
  Call c = {};
  read_queries(c, given);
  read_cache(c, given);
  read_visual(c.visual, given);
  read_masses(c, given);
  Numbers(given.next()).read_score(c.score);
  auto* scores = given.address<float>();
  return unlocked(read_scratch(given), [&](const Kernels& kernels, const Scratch& memory) {
    return score(kernels, c, scores, memory);
  });
}

// The scores of all queries of all rows, how many a row has and which are real, then what cuts
// their candidates.
inline int64_t bound_select(Given given) {
  Call c = {};
  const Tensor scores = given.tensor(2);
  c.queries.count = given.small();
  if (c.queries.count < 1) throw std::invalid_argument("expected a query or more");
  c.queries.real = given.address<const int32_t>();
  c.B = scores.size(0) / c.queries.count;
  c.H = c.G = c.D = 1;
  c.cache.capacity = scores.size(1);
  c.cache.starts = given.address<const int32_t>();
  c.cache.lengths = given.address<const int32_t>();
  read_visual(c.visual, given);
  read_chosen(c, given);
  Numbers(given.next()).read_score(c.score);
  return unlocked(read_scratch(given), [&](const Kernels& kernels, const Scratch& memory) {
    return select(kernels, c, scores.address<const float>(), memory);
  });
}

inline int64_t bound_decode(Given given) {
  Call c = {};
  read_queries(c, given);
  read_cache(c, given);
  read_visual(c.visual, given);
  read_chosen(c, given);
  const Numbers numbers(given.next());
  numbers.read_score(c.score);
  const bool dense = numbers.dense_output();
  auto* scores = given.address<float>();
  return unlocked(read_scratch(given), [&](const Kernels& kernels, const Scratch& memory) {
    return decode(kernels, c, dense, scores, memory);
  });
}

inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

inline uint64_t bound_read(uintptr_t address, int64_t count, int pages_ahead, int threads) {
  py::gil_scoped_release released;
  return read_stream(current(), reinterpret_cast<const char*>(address), count, pages_ahead,
                     threads);
}

// K and V [B, G, N, D], of which row 0 is read, the positions, and how many keys ahead they are
// asked for.
inline uint64_t bound_gather(Given given) {
  const Tensor k = given.tensor(4), v = given.tensor(4), positions = given.tensor(1);
  const int64_t item = k.bits / 8;
  GatherProbe probe;
  probe.k = k.address<const char>();
  probe.v = v.address<const char>();
  probe.positions = positions.address<const int32_t>();
  probe.head_stride = k.strides[1] * item;
  probe.token_stride = k.strides[2] * item;
  probe.count = positions.size(0);
  probe.heads = k.size(1);
  probe.bytes = static_cast<int>(k.size(3) * item);
  probe.ahead = given.small();
  const int threads = given.threads();
  py::gil_scoped_release released;
  return read_gathered(current(), probe, threads);
}

// Tuples (node, cores), one a worker.
inline void bound_places(const std::vector<std::pair<int, std::vector<int>>>& given) {
  std::vector<Place> places;
  for (const auto& [node, cores] : given) places.push_back({node, cores});
  set_places(std::move(places));
}

// Keys and values of tokens [tokens, G, D], pages of both [P, G, page, D], and int64 slots.
inline int64_t bound_write_pages(Given given) {
  const Tensor k = given.tensor(3), v = given.tensor(3);
  const Tensor k_pages = given.tensor(4), v_pages = given.tensor(4), slots = given.tensor(1);
  const int64_t item = k.bits / 8;
  const auto token = [item](const Tensor& t) -> TokenStrides {
    return {item * t.strides[0], item * t.strides[1]};
  };
  const auto page = [item](const Tensor& t) -> PageStrides {
    return {item * t.strides[0], item * t.strides[1], item * t.strides[2]};
  };
  PageWrite w = {};
  w.k = k.address<const char>();
  w.v = v.address<const char>();
  w.k_stride = token(k);
  w.v_stride = token(v);
  w.k_pages = k_pages.address<char>();
  w.v_pages = v_pages.address<char>();
  w.k_page_stride = page(k_pages);
  w.v_page_stride = page(v_pages);
  w.slots = slots.address<const int64_t>();
  w.tokens = slots.shape[0];
  w.pages = k_pages.shape[0];
  w.page_size = k_pages.shape[2];
  w.heads = k_pages.size(1);
  w.bytes = item * k_pages.shape[3];
  const int threads = given.threads();
  py::gil_scoped_release released;
  write_pages(w, threads);
  return 0;
}

// A function of Python that gets its arguments as they come: it enters fewer lines of code than
// pybind11's own way, and behind a layer all of them are cold.
template <auto run>
PyObject* entry(PyObject*, PyObject* const* items, Py_ssize_t count) {
  try {
    return PyLong_FromLongLong(static_cast<long long>(run(Given(items, count))));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <auto run>
PyMethodDef method(const char* name) {
  const auto fast = &entry<run>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast)), METH_FASTCALL,
          nullptr};
}

// Adds the submodule `cpu`.
inline void register_cpu(py::module_& m) {
  py::module_ cpu = m.def_submodule("cpu");
  static PyMethodDef methods[] = {
      method<bound_attend>("attend"),
      method<bound_score>("score"),
      method<bound_select>("select"),
      method<bound_decode>("decode"),
      method<bound_gather>("read_gathered"),
      method<bound_write_pages>("write_pages"),
      {},
  };
  if (PyModule_AddFunctions(cpu.ptr(), methods) != 0) throw py::error_already_set();
  // the type of tensor that all of these take
  cpu.def("read_tensors_of", [](const py::type& type) { exchange().open(type); });
  cpu.def("instruction_sets", &instruction_sets);
  cpu.def("instruction_set", [] { return std::string(current().name); });
  cpu.def("use_instruction_set", &use);
  cpu.def("rounds_bf16_weights", [] { return current().rounds_bf16_weights; });
  cpu.def("read_stream", &bound_read);
  cpu.def("evict", [](uintptr_t address, int64_t count) {
    py::gil_scoped_release released;
    return evict(reinterpret_cast<const char*>(address), count);
  });
  cpu.def("set_places", &bound_places);
}

}  // namespace visionpulse::cpu
