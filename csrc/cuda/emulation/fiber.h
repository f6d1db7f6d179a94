// Functions that each run on a stack of their own and hand the processor to one another, without system calls.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(RMT_EMULATION_UCONTEXT)
#define RMT_EMULATION_UCONTEXT
#endif
#if defined(RMT_EMULATION_UCONTEXT)
#include <ucontext.h>

#include <csetjmp>
#endif

namespace rmt::emulation {

#if !defined(RMT_EMULATION_UCONTEXT)
// Saves the registers that a call must keep, and takes those of the other stack.
extern "C" void rmt_emulation_switch(void** from, void* to);
#endif

// 64 KiB above a page that faults: what overflows it stops the program.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* low() const { return low_; }
  size_t size() const { return size_; }

 private:
  char* mapping_;
  char* low_;
  size_t size_;
};

class Fiber {
 public:
  // The next switch to this fiber begins `entry`, which must never return. What it did before is forgotten.
  void start(const Stack& stack, void (*entry)());

  // Leaves `from`, which is running; returns when something switches back to it.
  static void switch_over(Fiber& from, Fiber& to);

 private:
#if defined(RMT_EMULATION_UCONTEXT)
  ucontext_t context_;
  jmp_buf state_;
  bool begun_ = true;
#else
  void* stack_pointer_ = nullptr;
#endif
};

#if !defined(RMT_EMULATION_UCONTEXT)
inline void Fiber::switch_over(Fiber& from, Fiber& to) {
  rmt_emulation_switch(&from.stack_pointer_, to.stack_pointer_);
}
#endif

}  // namespace rmt::emulation
