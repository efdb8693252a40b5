// SPDX-License-Identifier: Apache-2.0
// The one path to the driver: device facts, launches, errors in words.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "csrc/cuda/plan.h"

namespace visionpulse::cuda {

// A failure of the driver: the entry point, CUDA's name for the error, and CUDA's text.
struct CudaError : std::runtime_error {
  CudaError(const std::string& entry, cudaError_t error);
};

// Why no kernel can run on `device`, or an empty string.
std::string unavailable(int32_t device);

// The device must be the current one.
const Chip& chip_of(int32_t device);

// Makes a device current for the calls of one op.
class OnDevice {
 public:
  explicit OnDevice(int32_t device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  int device_ = 0;
};

struct Launch {
  const char* range;  // of NVTX: visionpulse::<stage>
  const char* name;
  const void* function;
  dim3 grid;
  int32_t threads;
  int32_t shared_bytes;
  int32_t cluster;  // blocks along x; 1: none
};

// Loads a kernel that may be launched later, on the current device.
void load(const char* name, const void* function, int32_t device);

// Starts a kernel whose one argument is the struct at `args`. Where the chip has it, the blocks may
// start before the launch in front has ended: each kernel waits for that before it reads memory.
void launch(const Launch& what, const void* args, int32_t device, cudaStream_t stream);

}  // namespace visionpulse::cuda
