// SPDX-License-Identifier: Apache-2.0
// The CPU entries of the Python module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/engine.h"
#include "csrc/cpu/pages.h"
#include "csrc/cpu/pool.h"
#include "csrc/cpu/probe.h"
#include "csrc/reader.h"

namespace visionpulse::cpu {

inline Scratch read_scratch(const py::tuple& items) {
  Reader r(items, 3);
  Scratch scratch;
  scratch.bytes = r.address<void>();
  scratch.size = r.integer();
  scratch.threads = r.small();
  return scratch;
}

inline Call read_call(const py::tuple& queries, const py::tuple& query, const py::tuple& cache,
                      const py::tuple& visual, const py::tuple& params) {
  Call c = {};
  read_queries(c.queries, queries);
  read_query(c, query);
  read_cache(c.cache, cache);
  read_visual(c.visual, visual);
  read_params(c.score, params);
  return c;
}

// Runs an op without the GIL.
template <class Op>
int64_t unlocked(const py::tuple& scratch, Op op) {
  const Scratch memory = read_scratch(scratch);
  const Kernels& kernels = current();
  py::gil_scoped_release released;
  return op(kernels, memory);
}

inline int64_t bound_attend(const py::tuple& queries, const py::tuple& query,
                            const py::tuple& cache, const py::tuple& visual,
                            const py::tuple& selection, const py::tuple& params,
                            const py::tuple& out, const py::tuple& scratch) {
  Call c = read_call(queries, query, cache, visual, params);
  Reader r(selection, 3);
  c.selection.indices = r.address<const int32_t>();
  c.selection.counts = r.address<const int32_t>();
  c.selection.k_max = r.small();
  read_out(c, out);
  return unlocked(scratch, [&](const Kernels& kernels, const Scratch& memory) {
    return attend(kernels, c, memory);
  });
}

inline int64_t bound_score(const py::tuple& queries, const py::tuple& query, const py::tuple& cache,
                           const py::tuple& visual, const py::tuple& params,
                           const py::tuple& chosen, const py::tuple& out, uintptr_t scores,
                           const py::tuple& scratch) {
  Call c = read_call(queries, query, cache, visual, params);
  read_chosen(c, chosen);
  read_out(c, out);
  return unlocked(scratch, [&](const Kernels& kernels, const Scratch& memory) {
    return score(kernels, c, reinterpret_cast<float*>(scores), memory);
  });
}

inline int64_t bound_select(const py::tuple& queries, int rows, int capacity, uintptr_t starts,
                            uintptr_t lengths, const py::tuple& visual, const py::tuple& params,
                            const py::tuple& chosen, uintptr_t scores, const py::tuple& scratch) {
  Call c = {};
  read_queries(c.queries, queries);
  c.B = rows / c.queries.count;
  c.H = c.G = c.D = 1;
  c.cache.capacity = capacity;
  c.cache.starts = reinterpret_cast<const int32_t*>(starts);
  c.cache.lengths = reinterpret_cast<const int32_t*>(lengths);
  read_visual(c.visual, visual);
  read_params(c.score, params);
  read_chosen(c, chosen);
  return unlocked(scratch, [&](const Kernels& kernels, const Scratch& memory) {
    return select(kernels, c, reinterpret_cast<const float*>(scores), memory);
  });
}

inline int64_t bound_decode(const py::tuple& queries, const py::tuple& query,
                            const py::tuple& cache, const py::tuple& visual,
                            const py::tuple& params, const py::tuple& chosen, const py::tuple& out,
                            bool dense, uintptr_t scores, const py::tuple& scratch) {
  Call c = read_call(queries, query, cache, visual, params);
  read_chosen(c, chosen);
  read_out(c, out);
  return unlocked(scratch, [&](const Kernels& kernels, const Scratch& memory) {
    return decode(kernels, c, dense, reinterpret_cast<float*>(scores), memory);
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

// keys: addresses of K, V and the positions, then what GatherProbe holds.
inline uint64_t bound_gather(const py::tuple& keys, int threads) {
  Reader r(keys, 9);
  GatherProbe probe;
  probe.k = r.address<const char>();
  probe.v = r.address<const char>();
  probe.positions = r.address<const int32_t>();
  probe.head_stride = r.integer();
  probe.token_stride = r.integer();
  probe.count = r.small();
  probe.heads = r.small();
  probe.bytes = r.small();
  probe.ahead = r.small();
  py::gil_scoped_release released;
  return read_gathered(current(), probe, threads);
}

// Tuples (node, cores), one a worker.
inline void bound_places(const std::vector<std::pair<int, std::vector<int>>>& given) {
  std::vector<Place> places;
  for (const auto& [node, cores] : given) places.push_back({node, cores});
  set_places(std::move(places));
}

// Addresses and byte strides of the tokens, the same of the pages, then the sizes.
inline void bound_write_pages(const py::tuple& tokens, const py::tuple& pages,
                              const py::tuple& sizes) {
  PageWrite w = {};
  Reader from(tokens, 7), into(pages, 8), size(sizes, 6);
  w.k = from.address<const char>();
  w.v = from.address<const char>();
  w.k_stride = {from.integer(), from.integer()};
  w.v_stride = {from.integer(), from.integer()};
  w.slots = from.address<const int64_t>();
  w.k_pages = into.address<char>();
  w.v_pages = into.address<char>();
  w.k_page_stride = {into.integer(), into.integer(), into.integer()};
  w.v_page_stride = {into.integer(), into.integer(), into.integer()};
  w.tokens = size.integer();
  w.pages = size.integer();
  w.page_size = size.integer();
  w.heads = size.small();
  w.bytes = size.integer();
  const int threads = size.small();
  py::gil_scoped_release released;
  write_pages(w, threads);
}

// Adds the submodule `cpu`.
inline void register_cpu(py::module_& m) {
  py::module_ cpu = m.def_submodule("cpu");
  cpu.def("attend", &bound_attend);
  cpu.def("score", &bound_score);
  cpu.def("select", &bound_select);
  cpu.def("decode", &bound_decode);
  cpu.def("write_pages", &bound_write_pages);
  cpu.def("instruction_sets", &instruction_sets);
  cpu.def("instruction_set", [] { return std::string(current().name); });
  cpu.def("use_instruction_set", &use);
  cpu.def("rounds_bf16_weights", [] { return current().rounds_bf16_weights; });
  cpu.def("read_stream", &bound_read);
  cpu.def("read_gathered", &bound_gather);
  cpu.def("evict", [](uintptr_t address, int64_t count) {
    py::gil_scoped_release released;
    return evict(reinterpret_cast<const char*>(address), count);
  });
  cpu.def("set_places", &bound_places);
}

}  // namespace visionpulse::cpu
