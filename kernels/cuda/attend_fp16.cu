// SPDX-License-Identifier: Apache-2.0
// The kernels of float16 of attend.cu, as a file of their own for a build with nvcc.
#define VP_FP16
#include "kernels/cuda/attend.cu"
