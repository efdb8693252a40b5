// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/amx.h"

#include <cerrno>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace visionpulse::cpu {
namespace {

constexpr int kTileConfig = 17, kTileData = 18;  // bits of XCR0

#if defined(__x86_64__) && defined(__linux__)
AmxSupport support_here() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  AmxSupport support = {false, false, 0, ENOSYS};
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return support;
  support.bf16 = d >> 22 & 1;
  support.tiles = d >> 24 & 1;
  if (!support.tiles || __get_cpuid(1, &a, &b, &c, &d) == 0 || (c >> 27 & 1) == 0) return support;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  support.xcr0 = uint64_t{high} << 32 | low;
  support.error = 0;
  if (amx_refusal(support) != nullptr) return support;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) support.error = errno;
  return support;
}
#else
AmxSupport support_here() { return {false, false, 0, ENOSYS}; }
#endif

}  // namespace

const char* amx_refusal(const AmxSupport& support) {
  if (!support.tiles) return "this CPU has no AMX";
  if (!support.bf16) return "AMX of this CPU has no bfloat16";
  if ((support.xcr0 >> kTileConfig & 1) == 0 || (support.xcr0 >> kTileData & 1) == 0)
    return "the operating system does not save the tile registers of AMX";
  switch (support.error) {
    case 0:
      return nullptr;
    case ENOSPC:
      return "a signal stack (sigaltstack) of this process is too small for the tile registers of "
             "AMX";
    case EINVAL:
    case ENOSYS:
      return "the kernel knows no permission for AMX (Linux has it from 5.16 on)";
    default:
      return "the kernel refused this process the permission for AMX (ARCH_REQ_XCOMP_PERM)";
  }
}

const char* amx_refusal() {
  static const char* const refusal = amx_refusal(support_here());
  return refusal;
}

}  // namespace visionpulse::cpu
