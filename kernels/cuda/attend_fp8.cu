// SPDX-License-Identifier: Apache-2.0
// The kernels of 8-bit K and V of attend.cu, as a file of their own for a build with nvcc.
#define VP_FP8
#include "kernels/cuda/attend.cu"
