// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cpu/call.h"

namespace amx_model {

// The kernels of avx512_amx over the model of its instructions; nullptr where the CPU lacks
// avx512_bf16, which they need beside it.
const visionpulse::cpu::Kernels* kernels();

// Whether a call of theirs uses tiles.
bool takes(const visionpulse::cpu::Call& c);

}  // namespace amx_model
