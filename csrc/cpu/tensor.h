// SPDX-License-Identifier: Apache-2.0
// The caller's tensors, as DLPack's table for exchange shows them: one C call each. Behind a layer
// that filled the caches each getter of a tensor costs as much as a row of K, this a tenth of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/common/args.h"

namespace visionpulse::cpu {

namespace py = pybind11;

// What DLPack 1 calls a DLTensor; strides count elements.
struct Tensor {
  char* data;
  int32_t device_type, device;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t offset;  // of the first element, in bytes

  template <class T = void>
  T* address() const {
    return reinterpret_cast<T*>(data + offset);
  }
  int32_t size(int axis) const { return static_cast<int32_t>(shape[axis]); }
};

constexpr int32_t kOnCpu = 1;  // DLPack's number

// How a framework shows its tensors: the type they have, and its DLPackExchangeAPI.
class Exchange {
 public:
  // Takes the table of a type of tensor, which lives as long as the process.
  void open(const py::type& of) {
    struct Table {
      uint32_t major, minor;
      const void* older;
      void *allocate, *share, *wrap;
      int (*view)(void* object, Tensor* into);
    };
    const auto capsule = of.attr("__dlpack_c_exchange_api__");
    const auto* table =
        static_cast<const Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (table == nullptr) throw py::error_already_set();
    if (table->major != 1 || table->view == nullptr)
      throw std::runtime_error("tensors are shown by DLPack 1, not " +
                               std::to_string(table->major));
    type_ = reinterpret_cast<PyTypeObject*>(of.ptr());
    view_ = table->view;
  }

  // The tensor, as long as the object lives; of `axes` axes, or of any number where that is 0.
  Tensor view(PyObject* object, int axes) const {
    if (type_ == nullptr || !PyObject_TypeCheck(object, type_))
      throw std::invalid_argument(std::string("expected a tensor, got ") +
                                  Py_TYPE(object)->tp_name);
    Tensor t;
    if (view_(object, &t) != 0) throw py::error_already_set();
    if (t.device_type != kOnCpu) throw std::invalid_argument("expected a tensor of the CPU");
    if (axes != 0 && t.dims != axes)
      throw std::invalid_argument("expected a tensor of " + std::to_string(axes) + " axes, got " +
                                  std::to_string(t.dims));
    return t;
  }

 private:
  PyTypeObject* type_ = nullptr;
  int (*view_)(void*, Tensor*) = nullptr;
};

inline Exchange& exchange() {
  static Exchange of_process;
  return of_process;
}

// Reads what an entry is given, from left to right.
class Given {
 public:
  Given(PyObject* const* items, Py_ssize_t count) : at_(items), end_(items + count) {}
  PyObject* next() {
    if (at_ == end_) throw std::invalid_argument("too few arguments");
    return *at_++;
  }
  Tensor tensor(int axes) { return exchange().view(next(), axes); }
  // False where it is None.
  bool optional(Tensor& into, int axes) {
    PyObject* object = next();
    if (object == Py_None) return false;
    into = exchange().view(object, axes);
    return true;
  }
  // Its first element; nullptr for None.
  template <class T>
  T* address() {
    Tensor t;
    return optional(t, 0) ? t.address<T>() : nullptr;
  }
  bool flag() { return next() == Py_True; }
  int32_t small() {
    const long value = PyLong_AsLong(next());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<int32_t>(value);
  }
  // The number of threads, behind all others.
  int threads() {
    const int32_t value = small();
    if (at_ != end_) throw std::invalid_argument("too many arguments");
    return value;
  }

 private:
  PyObject *const *at_, *const *end_;
};

// One of the types that the kernels know.
inline DType dtype_of(const Tensor& t) {
  struct Known {
    uint8_t code, bits;  // DLPack's
    DType type;
  };
  constexpr Known kKnown[] = {{2, 32, DType::kFloat32},
                              {4, 16, DType::kBFloat16},
                              {2, 16, DType::kFloat16},
                              {10, 8, DType::kFloat8}};
  for (const Known& one : kKnown)
    if (one.code == t.code && one.bits == t.bits && t.lanes == 1) return one.type;
  throw std::invalid_argument("dtype outside what the kernels serve");
}

}  // namespace visionpulse::cpu
