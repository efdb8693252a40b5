// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace visionpulse {

// Hands out aligned pieces of the caller's scratch memory. With less memory than that, or none, it
// still counts: the same requests tell how many bytes are lacking.
class Arena {
 public:
  // `bytes` is aligned to `align`; nullptr: only count.
  Arena(void* bytes, int64_t size, int64_t align)
      : bytes_(static_cast<char*>(bytes)), size_(size), align_(align) {}

  // `count` values; nullptr where none are wanted or there is no memory. Only valid if nothing is
  // lacking in the end.
  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + align_ - 1) / align_ * align_;
    return bytes_ == nullptr || count == 0 ? nullptr : reinterpret_cast<T*>(bytes_ + at);
  }

  int64_t used() const { return used_; }

  // The bytes that all requests take, if that is more than there are; else 0.
  int64_t lacking() const { return used_ > size_ ? used_ : 0; }

 private:
  char* bytes_;
  int64_t size_, align_, used_ = 0;
};

}  // namespace visionpulse
