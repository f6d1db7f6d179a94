// What the dispatcher hands to the kernels of an instruction set beside the call itself.
#pragma once

#include "../problem.h"

namespace rmt {

// What the kernels borrow from torch: its threads, its matrix engine, and scratch memory.
struct Runtime {
  int threads;
  // Runs body(context, item, thread) for items [0, count), in ascending order of start, on up to `threads` threads.
  void (*parallel)(int threads, int count, void (*body)(void*, int, int), void* context);
  // C (m x n, fp32) (+)= A (m x k, bf16) @ B (k x n, bf16, pairs of rows interleaved).
  void (*brgemm)(int m, int n, int k, int lda, int ldb, int ldc, bool add, const uint16_t* a, const uint16_t* b,
                 float* c);
  void (*brgemm_release)();
  char* scratch;  // 64-byte aligned, as many bytes as the kernel asked for
};

// The kernels of one instruction set. `scratch` functions tell the bytes that a call needs.
struct Kernels {
  const char* isa;
  size_t (*forward_scratch)(const Problem&, int threads);
  void (*forward)(const Problem&, const Runtime&);
  size_t (*backward_scratch)(const Problem&, int threads);
  void (*backward)(const Problem&, const Runtime&);
};

}  // namespace rmt
