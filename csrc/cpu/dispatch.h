// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/call.h"

namespace visionpulse::cpu {

// The instruction sets of this build that this CPU runs, the best first.
std::vector<const Kernels*> available();

// The set in use: the best, or the one that VISIONPULSE_CPU_ISA names. Throws std::invalid_argument
// with the available names if that one is not among them.
const Kernels& current();

// Changes the set in use for this process; throws as current() does.
void use(const std::string& name);

}  // namespace visionpulse::cpu
