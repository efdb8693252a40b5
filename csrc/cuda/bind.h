// SPDX-License-Identifier: Apache-2.0
// The CUDA entries of the Python module; the module of the simulated GPU takes the same.
#pragma once

#include <pybind11/pybind11.h>

#include "csrc/cuda/engine.h"
#include "csrc/cuda/reader.h"

namespace visionpulse::cuda {

// (device, stream handle, most visual tokens of a row, how tiles are copied)
inline void read_target(Call& c, const py::tuple& items) {
  Reader r(items, 4);
  c.device = r.small();
  c.stream = static_cast<cudaStream_t>(r.address<void>());
  c.candidates = r.small();
  c.copies = static_cast<Copies>(r.small());
}

inline Scratch read_scratch(const py::tuple& items) {
  Reader r(items, 3);
  Scratch scratch;
  scratch.bytes = r.address<void>();
  scratch.size = r.integer();
  scratch.counters = r.address<uint32_t>();
  return scratch;
}

inline Call read_call(const py::tuple& target, const py::tuple& queries, const py::tuple& query,
                      const py::tuple& cache, const py::tuple& visual, const py::tuple& params) {
  Call c = {};
  read_target(c, target);
  read_queries(c.queries, queries);
  read_query(c, query);
  read_cache(c.cache, cache);
  read_visual(c.visual, visual);
  read_params(c.score, params);
  return c;
}

inline int64_t bound_attend(const py::tuple& target, const py::tuple& queries,
                            const py::tuple& query, const py::tuple& cache, const py::tuple& visual,
                            const py::tuple& selection, const py::tuple& params,
                            const py::tuple& out, const py::tuple& scratch) {
  Call c = read_call(target, queries, query, cache, visual, params);
  Reader r(selection, 4);
  c.selection.indices = r.address<const int32_t>();
  c.selection.counts = r.address<const int32_t>();
  c.selection.k_max = r.small();
  c.check_list = r.integer() != 0;
  read_out(c, out);
  return attend(c, read_scratch(scratch));
}

// `row_cache` and `row_visual` are of each query as a row of its own.
inline int64_t bound_score(const py::tuple& target, const py::tuple& queries,
                           const py::tuple& query, const py::tuple& cache, const py::tuple& visual,
                           const py::tuple& params, const py::tuple& chosen, const py::tuple& out,
                           uintptr_t scores, const py::tuple& row_cache,
                           const py::tuple& row_visual, const py::tuple& scratch) {
  Call c = read_call(target, queries, query, cache, visual, params);
  read_chosen(c, chosen);
  read_out(c, out);
  Call rows = c;
  rows.B *= c.queries.count;
  read_cache(rows.cache, row_cache);
  read_visual(rows.visual, row_visual);
  return score(c, rows, reinterpret_cast<float*>(scores), read_scratch(scratch));
}

inline int64_t bound_select(const py::tuple& target, const py::tuple&, int rows, int capacity,
                            uintptr_t starts, uintptr_t lengths, const py::tuple& visual,
                            const py::tuple& params, const py::tuple& chosen, uintptr_t scores,
                            const py::tuple& scratch) {
  Call c = {};
  read_target(c, target);
  c.B = rows;
  c.H = c.G = c.D = 1;
  c.cache.capacity = capacity;
  c.cache.starts = reinterpret_cast<const int32_t*>(starts);
  c.cache.lengths = reinterpret_cast<const int32_t*>(lengths);
  read_visual(c.visual, visual);
  read_params(c.score, params);
  read_chosen(c, chosen);
  return select(c, reinterpret_cast<const float*>(scores), read_scratch(scratch));
}

inline int64_t bound_decode(const py::tuple& target, const py::tuple& queries,
                            const py::tuple& query, const py::tuple& cache, const py::tuple& visual,
                            const py::tuple& params, const py::tuple& chosen, const py::tuple& out,
                            bool dense, uintptr_t scores, const py::tuple& scratch) {
  Call c = read_call(target, queries, query, cache, visual, params);
  read_chosen(c, chosen);
  read_out(c, out);
  return decode(c, dense, reinterpret_cast<float*>(scores), read_scratch(scratch));
}

// Adds the submodule `cuda`.
inline void register_cuda(py::module_& m) {
  py::module_ cuda = m.def_submodule("cuda");
  cuda.def("unavailable", &unavailable);
  cuda.def("attend", &bound_attend);
  cuda.def("score", &bound_score);
  cuda.def("select", &bound_select);
  cuda.def("decode", &bound_decode);
}

}  // namespace visionpulse::cuda
