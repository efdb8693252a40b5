// SPDX-License-Identifier: Apache-2.0
// Fibers: one stack per simulated thread and a switch that saves callee-saved registers only.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cusim {

constexpr size_t kStackBytes = 96 << 10;

#if defined(__x86_64__)
// Stores the current stack pointer in *from and continues at the one in `to`.
extern "C" void cusim_switch_stack(void** from, void* to);
asm(R"(
.text
.weak cusim_switch_stack
.type cusim_switch_stack, @function
cusim_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cusim_switch_stack, .-cusim_switch_stack
)");
#endif

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
  void* fake_stack = nullptr;  // ASan's own
  const void* bottom = nullptr;
  size_t size = 0;
};

// Stacks are kept for the life of the process; fibers of one launch take them in order.
class Stacks {
 public:
  char* at(size_t index) {
    while (bases_.size() <= index) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) abort();
      bases_.push_back(static_cast<char*>(memory));
    }
    return bases_[index];
  }

 private:
  std::vector<char*> bases_;
};

// Makes `context` start in `entry` on a stack of its own when first switched to.
inline void prepare(Context& context, char* stack, void (*entry)()) {
  context.bottom = stack;
  context.size = kStackBytes;
  context.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // a return address for `entry`, which never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = kStackBytes;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
#endif
}

// Goes from one context to another; a dying one gives its ASan stack back.
inline void switch_to(Context& from, Context& to, bool dying) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.fake_stack, to.bottom, to.size);
#else
  (void)dying;
#endif
#if defined(__x86_64__)
  cusim_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing a fiber does: tells ASan, and learns the stack it came from.
inline void arrived(Context& came_from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &came_from.bottom, &came_from.size);
#else
  (void)came_from;
#endif
}

}  // namespace cusim
