// SPDX-License-Identifier: Apache-2.0
// The kernels of float32 of score.cu, as a file of their own for a build with nvcc.
#define VP_FP32
#include "kernels/cuda/score.cu"
