// SPDX-License-Identifier: Apache-2.0
// Reads the tuples that visionpulse/backends/packing.py makes for both engines: addresses, strides
// and host numbers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/common/args.h"

namespace visionpulse {

namespace py = pybind11;

// Reads a tuple from left to right.
class Reader {
 public:
  Reader(const py::tuple& items, py::ssize_t expected) : items_(items) {
    if (items.size() != static_cast<size_t>(expected))
      throw std::invalid_argument("expected a tuple of " + std::to_string(expected) +
                                  " numbers, got " + std::to_string(items.size()));
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
  HeadStrides head_strides() { return {integer(), integer()}; }

 private:
  PyObject* next() { return PyTuple_GET_ITEM(items_.ptr(), at_++); }
  const py::tuple& items_;
  py::ssize_t at_ = 0;
};

template <class Call>
void read_query(Call& c, const py::tuple& items) {
  Reader r(items, 8);
  c.q = r.address<const void>();
  c.q_stride = r.head_strides();
  c.dtype = static_cast<DType>(r.small());
  c.B = r.small();
  c.H = r.small();
  c.G = r.small();
  c.D = r.small();
  if (static_cast<uint32_t>(c.dtype) > 2 || c.D < 1 || c.D > kMaxHeadDim || c.G < 1 ||
      c.H % c.G != 0 || c.H / c.G > kMaxGroup)
    throw std::invalid_argument("query shape or dtype outside what the kernels serve");
}

// The queries of a row.
inline void read_queries(QueriesArgs& queries, const py::tuple& items) {
  Reader r(items, 4);
  queries.count = r.small();
  queries.q_stride = r.integer();
  queries.out_stride = r.integer();
  queries.real = r.address<const int32_t>();
  if (queries.count < 1 || queries.count > kMaxQueries)
    throw std::invalid_argument("queries of a row outside what the kernels serve");
}

inline void read_cache(CacheArgs& a, const py::tuple& items) {
  Reader r(items, 20);
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
  a.dtype = static_cast<DType>(r.small());
  for (CacheScale* scale : {&a.k_scale, &a.v_scale}) {
    scale->values = r.address<const float>();
    scale->stride = r.small();
  }
  if (static_cast<uint32_t>(a.dtype) > 3)
    throw std::invalid_argument("dtype of the cache outside what the kernels serve");
}

inline void read_visual(VisualArgs& v, const py::tuple& items) {
  Reader r(items, 3);
  v.spans = r.address<const int32_t>();
  v.offsets = r.address<const int32_t>();
  v.spans_per_row = r.small();
}

inline void read_params(ScoreArgs& s, const py::tuple& items) {
  Reader r(items, 11);
  s.scale = r.number();
  s.softcap = r.number();
  s.window = r.small();
  s.tau = r.number();
  s.r_min = r.number();
  s.r_max = r.number();
  s.mass_of = static_cast<MassOf>(r.small());
  s.kind = static_cast<ScoreKind>(r.small());
  s.k_max = r.small();
  s.ratio = r.address<const float>();
  s.wanted = r.address<const int32_t>();
}

template <class Call>
void read_out(Call& c, const py::tuple& items) {
  Reader r(items, 3);
  c.out = r.address<void>();
  c.out_stride = r.head_strides();
}

// Where a selection and its masses are written.
template <class Call>
void read_chosen(Call& c, const py::tuple& items) {
  Reader r(items, 4);
  c.indices = r.address<int32_t>();
  c.counts = r.address<int32_t>();
  c.mass = r.address<float>();
  c.mass_mean = r.address<float>();
}

}  // namespace visionpulse
