// SPDX-License-Identifier: Apache-2.0
// The runtime calls that csrc/cuda makes, on a simulated GPU whose facts a test may set.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "cusim.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaFuncAttributes {
  int ptxVersion;
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cusim {

struct Gpu {
  int capability = 90, multiprocessors = 2, shared_bytes = 227 << 10;
};
inline Gpu gpu;
inline std::string last_error;
inline int launches = 0;

inline int current = 0;  // device
// What a capture under way lets a kernel be loaded in: anything without one, or only relaxed mode,
// or nothing.
enum class Capture { kNone, kStrict, kNothing };
inline Capture capture = Capture::kNone;
inline cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
// Of each kernel that is loaded on a device: the dynamic shared memory that it may have.
inline std::map<std::pair<const void*, int>, size_t> loaded;
// And those that asked for all the shared memory that there is.
inline std::set<std::pair<const void*, int>> carved;

// The device of a stream lies in the upper half of its handle; 0 is the stream of any.
inline int device_of(cudaStream_t stream) {
  const auto handle = reinterpret_cast<uintptr_t>(stream);
  return handle ? static_cast<int>(handle >> 32) : current;
}

inline cudaError_t fails(cudaError_t error, const char* why) {
  last_error = why;
  return error;
}

// Loads a kernel at its first use on the current device.
inline cudaError_t load(const void* function) {
  if (loaded.count({function, current})) return cudaSuccess;
  const bool relaxed = capture == Capture::kStrict && capture_mode == cudaStreamCaptureModeRelaxed;
  if (capture != Capture::kNone && !relaxed) {
    return fails(cudaErrorStreamCaptureUnsupported, "a kernel is loaded while a graph is captured");
  }
  loaded[{function, current}] = 48 << 10;
  return cudaSuccess;
}

}  // namespace cusim

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cusim"; }
inline const char* cudaGetErrorString(cudaError_t) { return cusim::last_error.c_str(); }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cusim::current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  cusim::current = device;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, cusim::capture_mode);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  if (const cudaError_t error = cusim::load(function)) return error;
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    cusim::loaded[{function, cusim::current}] = value;
  } else if (value == cudaSharedmemCarveoutMaxShared) {
    cusim::carved.insert({function, cusim::current});
  }
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void* function) {
  of->ptxVersion = cusim::code_of(cusim::gpu.capability);
  return cusim::load(function);
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = cusim::gpu.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = cusim::gpu.capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = cusim::gpu.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cusim::gpu.shared_bytes;
      break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                       void** args) {
  if (cusim::device_of(config->stream) != cusim::current) {
    return cusim::fails(cudaErrorInvalidResourceHandle, "a stream of a device that is not current");
  }
  if (const cudaError_t error = cusim::load(function)) return error;
  if (config->dynamicSmemBytes > cusim::loaded[{function, cusim::current}]) {
    return cusim::fails(cudaErrorLaunchFailure, "more shared memory than the kernel was allowed");
  }
  if (!cusim::carved.count({function, cusim::current})) {
    return cusim::fails(cudaErrorLaunchFailure, "a kernel leaves its shared memory to the driver");
  }
  ++cusim::launches;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
        cusim::code_of(cusim::gpu.capability) < 90) {
      cusim::last_error = "an early launch of a kernel that does not wait for the one in front";
      return cudaErrorLaunchFailure;
    }
  }
  // on the host a kernel takes its one argument by reference
  const auto kernel =
      reinterpret_cast<void (*)(const void*)>(reinterpret_cast<uintptr_t>(function));
  try {
    cusim::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster,
                  [=] { kernel(args[0]); });
  } catch (const std::exception& error) {
    cusim::last_error = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
