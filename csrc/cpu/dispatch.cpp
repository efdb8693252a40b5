// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "csrc/cpu/amx.h"

namespace visionpulse::cpu {
namespace {

constexpr const char* kVariable = "VISIONPULSE_CPU_ISA";

std::atomic<const Kernels*> in_use{nullptr};

constexpr const char* kAmx = "avx512_amx";

#if defined(VP_HAVE_NEON_BF16)
// FEAT_BF16, which only CPUs of Armv8.2 and later have.
bool multiplies_bf16_pairs() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int present = 0;
  size_t size = sizeof present;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &present, &size, nullptr, 0) == 0 &&
         present != 0;
#else
  return false;
#endif
}
#endif

const Kernels& find(const std::string& name, const std::string& source) {
  for (const Kernels* kernels : available())
    if (name == kernels->name) return *kernels;
  std::string names;
  for (const Kernels* kernels : available())
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  std::string why;
  if (name == kAmx && amx_refusal() != nullptr) why = std::string("; ") + amx_refusal();
  throw std::invalid_argument(source + " asks for the instruction set '" + name +
                              "', but this build on this CPU has: " + names + why);
}

}  // namespace

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  // all of x86-64-v4, because the compiler may use all of it
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("lzcnt");
  // tables of bytes too: of the CPUs with bfloat16 only Cooper Lake has none, and takes avx512
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  (void)bf16;
#if defined(VP_HAVE_AVX512_AMX)
  // this asks the kernel for permission, once, which makes the signal frames of the process larger
  if (bf16 && amx_refusal() == nullptr) found.push_back(&amx_kernels());
#endif
#if defined(VP_HAVE_AVX512_BF16)
  if (bf16) found.push_back(&kAvx512Bf16);
#endif
#if defined(VP_HAVE_AVX512)
  if (avx512) found.push_back(&kAvx512);
#endif
#if defined(VP_HAVE_AVX2)
  if (avx2) found.push_back(&kAvx2);
#endif
#endif
#if defined(VP_HAVE_NEON_BF16)
  if (multiplies_bf16_pairs()) found.push_back(&kNeonBf16);
#endif
#if defined(VP_HAVE_NEON)
  found.push_back(&kNeon);
#endif
  found.push_back(&kBaseline);
  return found;
}

const Kernels& current() {
  const Kernels* kernels = in_use.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* name = std::getenv(kVariable);
    kernels = name != nullptr && *name != '\0' ? &find(name, kVariable) : available().front();
    in_use.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void use(const std::string& name) {
  in_use.store(&find(name, "the call"), std::memory_order_release);
}

}  // namespace visionpulse::cpu
