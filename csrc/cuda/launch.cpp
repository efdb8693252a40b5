// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/launch.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#endif

namespace visionpulse::cuda {

namespace {

void check(const char* entry, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that was reported must not meet the next launch
  throw CudaError(entry, error);
}

int attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int32_t capability_of(int32_t device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// Names the calls inside for a profiler that looks; nothing where the toolkit came without NVTX.
class Range {
 public:
#if __has_include(<nvtx3/nvToolsExt.h>)
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
#else
  explicit Range(const char*) {}
#endif
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

std::mutex mutex;

// A kernel is loaded at its first use, which a capture of a graph forbids unless it is relaxed.
class Loading {
 public:
  Loading() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Loading() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Loading(const Loading&) = delete;
  Loading& operator=(const Loading&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

constexpr int32_t kPlainShared = 48 << 10;  // dynamic shared memory that every kernel has

// Loads a kernel once per device, and asks for more shared memory where it needs more. All share
// one split of the memory that L1 has part of: two kernels of different splits do not overlap, and
// the driver knows of no second block that a plan counts on.
void prepare(const char* name, const void* function, int32_t shared_bytes, int32_t device) {
  static std::map<std::pair<const void*, int32_t>, int32_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int32_t& have = allowed[{function, device}];
  if (have >= std::max(shared_bytes, kPlainShared)) return;
  const Loading loading;
  if (have == 0) {
    cudaFuncAttributes attributes;
    check(name, cudaFuncGetAttributes(&attributes, function));
    check(name, cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
    have = kPlainShared;
  }
  if (shared_bytes <= have) return;
  check(name,
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  have = shared_bytes;
}

}  // namespace

CudaError::CudaError(const std::string& entry, cudaError_t error)
    : std::runtime_error(entry + ": " + cudaGetErrorName(error) + ": " +
                         cudaGetErrorString(error)) {}

std::string unavailable(int32_t device) try {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count <= device) error = cudaErrorNoDevice;
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no GPU that this build can use: ") + cudaGetErrorString(error);
  }
  const OnDevice current(device);
  const Loading loading;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, score_finish_kernel());
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  const int32_t capability = capability_of(device);
  return "the kernels do not load on this GPU of compute capability " +
         std::to_string(capability / 10) + "." + std::to_string(capability % 10) + " (" +
         cudaGetErrorString(error) +
         "); build with VISIONPULSE_CUDA_ARCHS=" + std::to_string(capability);
} catch (const CudaError& error) {  // the device refuses us: it is full, or another's alone
  return std::string("the GPU cannot be used: ") + error.what();
}

const Chip& chip_of(int32_t device) {
  static std::map<int32_t, Chip> chips;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = chips.find(device);
  if (found != chips.end()) return found->second;
  Chip chip = {};
  chip.capability = capability_of(device);
  // All kernels are built for the same list; this one is empty where its code has no clusters.
  const Loading loading;
  cudaFuncAttributes loaded = {};
  check("cudaFuncGetAttributes", cudaFuncGetAttributes(&loaded, select_kernel(true)));
  chip.code = std::min(chip.capability, loaded.ptxVersion);
  chip.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  chip.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return chips.emplace(device, chip).first->second;
}

OnDevice::OnDevice(int32_t device) : device_(device) {
  check("cudaGetDevice", cudaGetDevice(&before_));
  if (before_ != device_) check("cudaSetDevice", cudaSetDevice(device_));
}

OnDevice::~OnDevice() {
  if (before_ != device_) cudaSetDevice(before_);
}

void load(const char* name, const void* function, int32_t device) {
  prepare(name, function, 0, device);
}

void launch(const Launch& what, const void* args, int32_t device, cudaStream_t stream) {
  const Range range(what.range);
  prepare(what.name, what.function, what.shared_bytes, device);
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (chip_of(device).dependent_launch()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (what.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = what.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = what.grid;
  config.blockDim = dim3(what.threads);
  config.dynamicSmemBytes = what.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  void* list[] = {const_cast<void*>(args)};
  check(what.name, cudaLaunchKernelExC(&config, what.function, list));
}

}  // namespace visionpulse::cuda
