// SPDX-License-Identifier: Apache-2.0
// New keys and values into the pages of a cache.
#pragma once

#include <cstdint>

namespace visionpulse::cpu {

// Bytes from one token and head, or page, head and slot, to the next.
struct TokenStrides {
  int64_t token, head;
};
struct PageStrides {
  int64_t page, head, slot;
};

struct PageWrite {
  const char *k, *v;
  TokenStrides k_stride, v_stride;
  char *k_pages, *v_pages;
  PageStrides k_page_stride, v_page_stride;
  const int64_t* slots;  // [tokens]; token t goes to slot `slots[t] % page_size` of its page
  int64_t tokens, pages, page_size;
  int heads;
  int64_t bytes;  // of one key
};

// Copies the tokens; one with a negative slot is left out. Throws, and writes nothing, where a slot
// lies beyond the pages.
void write_pages(const PageWrite& write, int threads);

}  // namespace visionpulse::cpu
