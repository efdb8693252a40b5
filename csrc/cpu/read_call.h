// SPDX-License-Identifier: Apache-2.0
// Reads the records that visionpulse/backends/cpu.py hands down, in its order, into a Call.
#pragma once

#include "csrc/cpu/tensor.h"
#include "kernels/cpu/call.h"

namespace visionpulse::cpu {

// q, the output or None, and which queries are real or None; [B, H, D] or [B, Q, H, D].
inline void read_queries(Call& c, Given& given) {
  const Tensor q = given.tensor(0);
  if (q.dims != 3 && q.dims != 4) throw std::invalid_argument("q must have 3 or 4 axes");
  const int last = q.dims - 1;
  const bool several = q.dims == 4;
  c.q = q.address();
  c.dtype = dtype_of(q);
  c.B = q.size(0);
  c.H = q.size(last - 1);
  c.D = q.size(last);
  c.q_stride = {q.strides[0], q.strides[last - 1]};
  c.queries.count = several ? q.size(1) : 1;
  c.queries.q_stride = several ? q.strides[1] : 0;
  if (Tensor out; given.optional(out, q.dims)) {
    c.out = out.address();
    c.out_stride = {out.strides[0], out.strides[last - 1]};
    c.queries.out_stride = several ? out.strides[1] : 0;
  }
  c.queries.real = given.address<const int32_t>();
}

inline CacheScale read_scale(Given& given) {
  Tensor scale;
  if (!given.optional(scale, 0)) return {nullptr, 0};
  const bool one = scale.dims == 0 || scale.shape[0] == 1;
  return {scale.address<const float>(), one ? 0 : 1};
}

// K, V, starts, lengths, their scales, the block table or None, and whether heads come before
// tokens.
inline void read_cache(Call& c, Given& given) {
  CacheArgs& a = c.cache;
  const Tensor k = given.tensor(4), v = given.tensor(4);
  a.starts = given.address<const int32_t>();
  a.lengths = given.address<const int32_t>();
  a.k_scale = read_scale(given);
  a.v_scale = read_scale(given);
  Tensor table;
  const bool paged = given.optional(table, 2);
  const bool heads_first = given.flag();
  const int head = heads_first ? 1 : 2, token = heads_first ? 2 : 1;
  a.k = k.address();
  a.v = v.address();
  a.dtype = dtype_of(k);
  a.k_stride = {k.strides[0], k.strides[head], k.strides[token]};
  a.v_stride = {v.strides[0], v.strides[head], v.strides[token]};
  a.pages = k.size(0);
  a.capacity = k.size(token);
  if (paged) {
    a.table = table.address<const int32_t>();
    a.table_stride = table.strides[0];
    a.page_size = a.capacity;
    a.capacity *= table.size(1);
  }
  c.G = k.size(head);
  if (c.D < 1 || c.D > kMaxHeadDim || c.G < 1 || c.H % c.G != 0 || c.H / c.G > kMaxGroup ||
      c.dtype == DType::kFloat8 || c.queries.count < 1 || c.queries.count > kMaxQueries)
    throw std::invalid_argument("shape or dtype outside what the kernels serve");
}

// Spans and offsets, or None twice.
inline void read_visual(VisualArgs& v, Given& given) {
  if (Tensor spans; given.optional(spans, 3)) {
    v.spans = spans.address<const int32_t>();
    v.spans_per_row = spans.size(1);
  }
  v.offsets = given.address<const int32_t>();
}

// Indices and counts, or None twice.
inline SelectionArgs read_selection(Given& given) {
  SelectionArgs s = {};
  if (Tensor indices; given.optional(indices, 2)) {
    s.indices = indices.address<const int32_t>();
    s.k_max = indices.size(1);
  }
  s.counts = given.address<const int32_t>();
  return s;
}

inline void read_masses(Call& c, Given& given) {
  c.mass = given.address<float>();
  c.mass_mean = given.address<float>();
}

// Where a selection and its masses are written.
inline void read_chosen(Call& c, Given& given) {
  c.indices = given.address<int32_t>();
  c.counts = given.address<int32_t>();
  read_masses(c, given);
}

// A `Params` of visionpulse/call.py, read by place.
class Numbers {
 public:
  explicit Numbers(PyObject* params) : params_(params) {
    if (!PyTuple_Check(params) || PyTuple_GET_SIZE(params) != 12)
      throw std::invalid_argument("expected the 12 numbers of a call");
  }
  void read_attention(ScoreArgs& s) const {
    s.scale = number(0);
    s.softcap = number(1);
    s.window = small(2);
  }
  void read_score(ScoreArgs& s) const {
    read_attention(s);
    s.tau = number(3);
    s.r_min = number(4);
    s.r_max = number(5);
    s.mass_of = is(6, "mean") ? MassOf::kMean : MassOf::kMax;
    s.kind = is(7, "prob")    ? ScoreKind::kProb
             : is(7, "logit") ? ScoreKind::kLogit
                              : ScoreKind::kProbTau;
    s.k_max = small(9);
    s.ratio = address<const float>(10);
    s.wanted = address<const int32_t>(11);
  }
  bool dense_output() const { return is(8, "dense"); }

 private:
  PyObject* at(int place) const { return PyTuple_GET_ITEM(params_, place); }
  float number(int place) const {
    const double value = PyFloat_AsDouble(at(place));
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<float>(value);
  }
  int32_t small(int place) const {
    const long value = PyLong_AsLong(at(place));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<int32_t>(value);
  }
  bool is(int place, const char* name) const {
    return PyUnicode_Check(at(place)) && PyUnicode_CompareWithASCIIString(at(place), name) == 0;
  }
  template <class T>
  T* address(int place) const {
    return at(place) == Py_None ? nullptr : exchange().view(at(place), 1).address<T>();
  }
  PyObject* params_;
};

}  // namespace visionpulse::cpu
