// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/call.h"

namespace visionpulse::cpu {

// The instruction sets that this build has and this CPU runs, the best first.
std::vector<const Kernels*> available();

// The set in use: the best, or the one that VISIONPULSE_CPU_ISA names. Throws std::invalid_argument
// for a name that is unknown or that this CPU lacks, with those there are.
const Kernels& current();

// Changes the set in use for this process.
void use(const std::string& name);

}  // namespace visionpulse::cpu
