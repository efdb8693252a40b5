// SPDX-License-Identifier: Apache-2.0
// The runtime calls that csrc/cuda makes, on a simulated GPU whose facts a test may set.
#pragma once

#include <cstdlib>
#include <exception>
#include <string>

#include "cusim.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorNoDevice = 100, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
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

}  // namespace cusim

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cusim"; }
inline const char* cudaGetErrorString(cudaError_t) { return cusim::last_error.c_str(); }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  of->ptxVersion = cusim::code_of(cusim::gpu.capability);
  return cudaSuccess;
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
