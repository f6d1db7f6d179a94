#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack

#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace rmt::emulation {

namespace {
constexpr size_t kStackBytes = 64 * 1024;

// Stacks begin at different offsets in their pages, or the frames of all threads would fall into the same lines of a
// cache.
size_t next_colour() {
  static size_t colour = 0;
  return (colour += 11 * 64) % 4096;
}
}  // namespace

Stack::Stack() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = guard + kStackBytes + 4096;
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping, guard, PROT_NONE);
  mapping_ = static_cast<char*>(mapping);
  low_ = mapping_ + guard;
  size_ = bytes - guard - next_colour();
}

Stack::~Stack() { munmap(mapping_, static_cast<size_t>(low_ - mapping_) + kStackBytes + 4096); }

#if defined(RMT_EMULATION_UCONTEXT)

void Fiber::start(const Stack& stack, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack.low();
  context_.uc_stack.ss_size = stack.size();
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
  begun_ = false;
}

void Fiber::switch_over(Fiber& from, Fiber& to) {
  if (_setjmp(from.state_)) return;
  if (to.begun_) _longjmp(to.state_, 1);
  to.begun_ = true;
  setcontext(&to.context_);
}

#else

asm(R"(
.text
.p2align 4
.globl rmt_emulation_switch
.hidden rmt_emulation_switch
.type rmt_emulation_switch, @function
rmt_emulation_switch:
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
.size rmt_emulation_switch, .-rmt_emulation_switch
)");

void Fiber::start(const Stack& stack, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack.low()) + stack.size()) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8;  // 6 registers, the entry, and where its caller would be
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = frame;
}

#endif

}  // namespace rmt::emulation
