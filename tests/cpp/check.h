// SPDX-License-Identifier: Apache-2.0
// CHECK prints what failed and where; report() returns the exit status.
#pragma once

#include <cstdio>

namespace check {

inline int failures = 0, checks = 0;

inline int report(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition)                                                  \
  do {                                                                    \
    ++check::checks;                                                      \
    if (!(condition)) {                                                   \
      ++check::failures;                                                  \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                     \
  } while (false)

// With values: CHECK_THAT(a == b, "a=%d b=%d", a, b).
#define CHECK_THAT(condition, ...)                                        \
  do {                                                                    \
    ++check::checks;                                                      \
    if (!(condition)) {                                                   \
      ++check::failures;                                                  \
      std::printf("%s:%d: failed: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                           \
      std::printf("\n");                                                  \
    }                                                                     \
  } while (false)
