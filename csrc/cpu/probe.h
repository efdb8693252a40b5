// SPDX-License-Identifier: Apache-2.0
// Ceilings of this machine's memory, on the pool's threads.
#pragma once

#include <cstdint>

#include "kernels/cpu/call.h"

namespace visionpulse::cpu {

// Reads a buffer once. The result only keeps the loads alive.
uint64_t read_stream(const Kernels& kernels, const char* bytes, int64_t count, int pages_ahead,
                     int threads);

// Reads the vectors of a list once, for every head.
uint64_t read_gathered(const Kernels& kernels, const GatherProbe& probe, int threads);

// Takes a buffer out of every cache of the machine, whatever their sizes. Returns false where the
// CPU has no instruction for it.
bool evict(const char* bytes, int64_t count);

}  // namespace visionpulse::cpu
