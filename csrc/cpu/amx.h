// SPDX-License-Identifier: Apache-2.0
// Whether this process may use the tile registers of AMX.
#pragma once

#include <cstdint>

namespace visionpulse::cpu {

// What CPU, operating system and kernel say.
struct AmxSupport {
  bool tiles, bf16;  // of the CPU
  uint64_t xcr0;     // registers that the operating system saves
  int error;         // of the permission, as errno; 0: granted
};

// Why AMX cannot be used; nullptr: it can.
const char* amx_refusal(const AmxSupport& support);

// The same of this process. Asks the kernel for permission the first time: it holds for all threads
// of the process, and for its children.
const char* amx_refusal();

}  // namespace visionpulse::cpu
